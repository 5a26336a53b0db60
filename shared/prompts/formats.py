# SPDX-License-Identifier: Apache-2.0
"""The rows of one file, as a stream, whatever its format: memory does not grow with the file.

    .jsonl .ndjson    one JSON value per line; a broken line costs only itself
    .json             JSON lines as well, or one JSON list of rows, or one object that holds such a list
    .csv .tsv         the first line names the columns
    .parquet .arrow   tables

Text files may be compressed: .gz, .bz2, .xz, .zst, .lz4. JSON and text read the same in every format: a
byte order mark is skipped, NaN is a number, bytes that are not UTF-8 cost only their row. Tables pad
missing keys with null, so a null in a table is a key that the row does not have. An object with one
key twice, and a line of a .csv with more cells than columns, are refused: which value was meant is
anyone's guess.
"""

import csv
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
from shared.prompts.content import Unusable
from shared.prompts.messages import is_message
from shared.prompts.text_files import COMPRESSED, opened, require_data, require_text, unreadable

_MAX_ROW_BYTES = 64 << 20  # no conversation that a target could take is as long
_MAX_OBJECT_BYTES = 1 << 28  # of a file that is one JSON object
_CHUNK_CHARS = 1 << 20
_BLANK = " \t\r\n"
_BLANK_BYTES = b"\xef\xbb\xbf \t\r\n"  # a byte order mark among them
_DECODER = json.JSONDecoder(object_pairs_hook=files.each_key_once)
_LENIENT = json.JSONDecoder()

Row = tuple[str, Any]  # its position ("line 3"), and its value or what is wrong with it


def suffix_of(path: Path) -> str:
    """The suffix that names the format, without that of a compression: `.jsonl` of a.jsonl.gz."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def is_data(path: Path) -> bool:
    """Whether the file's name is one of a format that is read."""
    is_plain = path.suffix.lower() not in COMPRESSED
    return suffix_of(path) in (FORMATS if is_plain else _TEXT_FORMATS)


def rows(path: Path) -> Iterator[Row]:
    """Every row of `path` with its position; a row that cannot be read is an `Unusable`.

    Raises:
        UserError: the file as a whole cannot be read; the message says why.
    """
    files.require_file(path)
    try:
        require_data(path)
        if suffix_of(path) not in _TABLES:
            require_text(path)
        yield from FORMATS.get(suffix_of(path), _json_lines)(path)
    except UserError:
        raise
    except (OSError, EOFError, ValueError, TypeError, OverflowError, zlib.error, lzma.LZMAError,
            csv.Error) as error:  # fmt: skip
        kind = suffix_of(path).lstrip(".") or "JSON lines"
        raise unreadable(path, f"a readable file of {kind}", error) from error


def parse_json(text: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        Unusable: it is not UTF-8, or not JSON.
    """
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=files.each_key_once)
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
    with opened(path) as stream:
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
    with opened(path) as stream:
        full = (line for line in _lines(stream) if line.strip(_BLANK_BYTES))
        first, second = next(full, b""), next(full, b"")
    start = first.strip(_BLANK_BYTES)
    value = _parsed(first)
    if value is None and start.startswith(b"[") and (start == b"[" or suffix_of(path) == ".json"):
        yield from _json_list(path)
        return
    if value is None and suffix_of(path) == ".json" and start.startswith(b"{"):
        with opened(path) as stream:
            value = _parsed(stream.read(_MAX_OBJECT_BYTES))
        if value is None and start == b"{":
            raise unreadable(path, "JSON lines, or one JSON list or object", "it broken or cut")
        second = b"" if value else second
    is_list = isinstance(value, list) and any(isinstance(each, dict) for each in value)
    is_whole = suffix_of(path) == ".json" or is_list
    if value is None or second or not is_whole:
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
    with opened(path) as stream:
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
                    value, end = _item(buffer, start)
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


def _item(buffer: str, start: int) -> tuple[Any, int]:
    """The value at `start`, or what is wrong with it, and where it ends.

    Raises:
        ValueError: it has no end yet.
    """
    try:
        return _DECODER.raw_decode(buffer, start)
    except ValueError as error:
        _, end = _LENIENT.raw_decode(buffer, start)
        return Unusable("broken_json", error), end


def _skip(buffer: str, start: int, *, first: bool) -> int:
    """Where the next item, or the end of the list, begins."""
    while start < len(buffer) and buffer[start] in (_BLANK + "[" if first else _BLANK + ","):
        start += 1
        if first and buffer[start - 1] == "[":
            break
    return start


def _table_of_text(path: Path) -> Iterator[Row]:
    with opened(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        csv.field_size_limit(_MAX_ROW_BYTES)
        dialect = "excel-tab" if suffix_of(path) == ".tsv" else "excel"
        # Strict: a quotation mark that nothing closes would swallow all further rows.
        table = csv.DictReader(text, dialect=dialect, strict=True)
        names = [name for name in table.fieldnames or () if name]
        if len(set(names)) < len(names):
            raise ValueError(f"two columns of one name among {names}")
        yield from _numbered(map(_cells, table))


def _cells(row: dict[str | None, Any]) -> Any:
    """A line's cells by column; a line that is short has no value in the last ones."""
    if None in row:
        return Unusable("ragged_row", "more cells than columns: is a quotation mark missing?")
    return {name: cell for name, cell in row.items() if cell is not None}


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
_TABLES = {".parquet": _table(tables.parquet), ".arrow": _table(tables.arrow)}
FORMATS = {**_TEXT_FORMATS, **_TABLES}
