# SPDX-License-Identifier: Apache-2.0
"""The rows of one file, as a stream, whatever its format: memory does not grow with the file.

    .jsonl .ndjson    one JSON value per line; a broken line costs only itself
    .json             JSON lines as well, or one JSON list of rows, or one object that holds such a list
    .csv .tsv         the first line names the columns
    .parquet .arrow   tables

Text files may be compressed: .gz, .bz2, .xz, .zst, .lz4. JSON and text read the same in every format: a
byte order mark is skipped, NaN is a number, bytes that are not UTF-8 cost only their row. Tables pad
missing keys with null, so a null in a table is a key that the row does not have.
"""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from shared.errors import UserError
from shared.io import files
from shared.prompts import tables
from shared.prompts.messages import Unusable, is_message

_MAX_ROW_BYTES = 64 << 20  # no conversation that a target could take is as long
_MAX_OBJECT_BYTES = 1 << 28  # of a file that is one JSON object
_CHUNK_CHARS = 1 << 20
_BLANK = " \t\r\n"
_BLANK_BYTES = b"\xef\xbb\xbf \t\r\n"  # a byte order mark among them
_DECODER = json.JSONDecoder()

Row = tuple[str, Any]  # its position ("line 3"), and its value or what is wrong with it


class _Arrow(io.RawIOBase):
    """Arrow's decompressing stream as a plain file object."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._stream = pa.input_stream(
            path, compression={".zst": "zstd", ".lz4": "lz4"}[path.suffix.lower()]
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


_COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(_Arrow(path), _CHUNK_CHARS),
    ".lz4": lambda path: io.BufferedReader(_Arrow(path), _CHUNK_CHARS),
}


def unreadable(path: Path, expected: str, error: object) -> UserError:
    """The refusal of a file that is not what its name says."""
    return UserError(
        f"{path}: expected {expected}, found {error}.",
        code="prompts-unreadable",
        remedy="Mend, replace or remove the file.",
        facts={"path": str(path)},
    )


def suffix_of(path: Path) -> str:
    """The suffix that names the format, without that of a compression: `.jsonl` of a.jsonl.gz."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in _COMPRESSED else name.suffix


def is_data(path: Path) -> bool:
    """Whether the file's name is one of a format that is read."""
    is_plain = path.suffix.lower() not in _COMPRESSED
    return suffix_of(path) in (FORMATS if is_plain else _TEXT_FORMATS)


def rows(path: Path) -> Iterator[Row]:
    """Every row of `path` with its position; a row that cannot be read is an `Unusable`.

    Raises:
        UserError: the file as a whole cannot be read; the message says why.
    """
    files.require_file(path)
    try:
        yield from FORMATS.get(suffix_of(path), _json_lines)(path)
    except UserError:
        raise
    except (OSError, EOFError, ValueError, TypeError, OverflowError, zlib.error, lzma.LZMAError,
            csv.Error) as error:  # fmt: skip
        kind = suffix_of(path).lstrip(".") or "JSON lines"
        raise unreadable(path, f"a readable file of {kind}", error) from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    opener = _COMPRESSED.get(path.suffix.lower())
    with opener(path) if opener else path.open("rb") as stream:
        yield stream


def parse_json(text: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        Unusable: it is not UTF-8, or not JSON.
    """
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unusable("not_utf8", error) from error
    except (ValueError, RecursionError) as error:
        raise Unusable("broken_json", error) from error


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines; of one that is too long only its beginning, so that no line fills the memory."""
    while line := stream.readline(_MAX_ROW_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = stream.readline(_MAX_ROW_BYTES + 1)


def _json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as stream:
        for number, line in enumerate(_lines(stream), start=1):
            if not line.strip():
                continue
            value: Any
            try:
                if len(line) > _MAX_ROW_BYTES:
                    raise Unusable("line_too_long", f"more than {_MAX_ROW_BYTES} bytes")
                value = parse_json(line)
            except Unusable as unusable:
                value = unusable
            yield f"line {number}", value


def _json(path: Path) -> Iterator[Row]:
    """JSON lines, one list, or one object, whatever the name says: the first lines tell."""
    with _open(path) as stream:
        full = (line for line in _lines(stream) if line.strip(_BLANK_BYTES))
        first, second = next(full, b""), next(full, b"")
    start = first.strip(_BLANK_BYTES)
    value = _parsed(first)
    if value is None and start.startswith(b"[") and (start == b"[" or suffix_of(path) == ".json"):
        yield from _json_list(path)
        return
    if value is None and suffix_of(path) == ".json" and start.startswith(b"{"):
        with _open(path) as stream:
            value = _parsed(stream.read(_MAX_OBJECT_BYTES))
        if value is None and start == b"{":
            raise unreadable(path, "JSON lines, or one JSON list or object", "it broken or cut")
        second = b"" if value else second
    if value is None or second or suffix_of(path) != ".json":
        yield from _json_lines(path)
        return
    yield from _numbered(_rows_inside(value))


def _numbered(found: Iterable[Any]) -> Iterator[Row]:
    for number, row in enumerate(found, start=1):
        yield f"row {number}", row


def _parsed(text: bytes) -> Any:
    try:
        return parse_json(text)
    except Unusable:
        return None


def _is_rows(value: Any) -> bool:
    """Whether it is a list of rows, and not of one conversation's messages."""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(row, dict) and not is_message(row) for row in value)


def _rows_inside(value: Any) -> list[Any]:
    """The rows of a whole file: a list's items, the list in {"version": ..., "data": [...]}, itself.

    Or those of a table by its columns, {"prompt": [...], "response": [...]}.
    """
    if isinstance(value, list):
        return [value] if any(map(is_message, value)) else value
    columns = list(value.values()) if isinstance(value, dict) else []
    lists = list(filter(_is_rows, columns))
    if len(lists) == 1:
        return lists[0]
    is_table = not lists and len(columns) > 1 and all(isinstance(each, list) for each in columns)
    if is_table and len({len(each) for each in columns}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return [value]


def _json_list(path: Path) -> Iterator[Row]:
    """The items of a list, each decoded as soon as it is read whole."""
    with _open(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
        buffer, number, ended = "", 0, False
        while not ended:
            chunk = text.read(max(_CHUNK_CHARS, len(buffer)))
            buffer += chunk
            if len(buffer) > 2 * _MAX_ROW_BYTES:
                raise unreadable(path, f"rows of at most {_MAX_ROW_BYTES} bytes", "a longer one")
            start = 0
            while (start := _skip(buffer, start, first=number == 0)) < len(buffer):
                if buffer[start] == "]":
                    ended = True
                    break
                try:
                    value, end = _DECODER.raw_decode(buffer, start)
                except RecursionError as error:
                    raise unreadable(path, "rows of JSON", "one nested too deeply") from error
                except ValueError as error:
                    if chunk:  # perhaps its end is still to be read
                        break
                    raise unreadable(path, "one JSON list of rows", error) from error
                if end == len(buffer) and chunk:  # a number's last digits may be still to be read
                    break
                start, number = end, number + 1
                yield f"row {number}", value
            buffer = buffer[start:]
            if not chunk and not ended:
                raise unreadable(path, "one JSON list of rows", "the end of the file within it")
        if (buffer[1:] + text.read(_CHUNK_CHARS)).strip():
            raise unreadable(path, "one JSON list of rows", "more behind its end")


def _skip(buffer: str, start: int, *, first: bool) -> int:
    """Where the next item, or the end of the list, begins."""
    while start < len(buffer) and buffer[start] in (_BLANK + "[" if first else _BLANK + ","):
        start += 1
        if first and buffer[start - 1] == "[":
            break
    return start


def _table_of_text(path: Path) -> Iterator[Row]:
    with _open(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        csv.field_size_limit(_MAX_ROW_BYTES)
        table = csv.DictReader(text, dialect="excel-tab" if suffix_of(path) == ".tsv" else "excel")
        yield from _numbered(table)


def _table(read: Callable[[Path], Iterator[Any]]) -> Callable[[Path], Iterator[Row]]:
    """`read` with Arrow's errors as ValueErrors; not all of them are."""

    def rows_of_table(path: Path) -> Iterator[Row]:
        import pyarrow as pa

        try:
            yield from _numbered(read(path))
        except pa.ArrowException as error:
            raise ValueError(str(error)) from error

    return rows_of_table


_TEXT_FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _table_of_text,
    ".tsv": _table_of_text,
}
FORMATS = {**_TEXT_FORMATS, ".parquet": _table(tables.parquet), ".arrow": _table(tables.arrow)}
