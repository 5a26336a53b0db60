# SPDX-License-Identifier: Apache-2.0
"""Where rows come from: files, folders, globs, data sets on a hub. Read as a stream.

JSON lines and Parquet are read a little at a time, and so is a `.json` file that holds one long
list; a hub's data set lies on disk as Arrow and is mapped. Memory does not grow with the input.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pydantic

from shared.config import Section, identity
from shared.errors import RetryableError, UserError
from shared.io import files
from shared.paths import find_input
from shared.prompts.rows import COLUMNS, BadRow, Prompt, Unusable, parse_line, parse_row, short_hash

SUFFIXES = (".jsonl", ".json", ".parquet")
_BATCH_ROWS = 256
_LONGEST_LINE_BYTES = 64 << 20  # no conversation that a target could take is as long
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Source(Section):
    """One place that prompts come from."""

    path: str = identity(
        ..., "File, folder, glob (workspace first), hub data set, or one of: sharegpt, ultrachat."
    )
    columns: dict[str, str] = identity({}, f"Where rows keep {', '.join(COLUMNS)}: name -> column.")
    split: str = identity("train", "Split of a hub data set.")
    subset: str | None = identity(None, "Configuration of a hub data set.")
    revision: str | None = identity(None, "Revision of a hub data set.")

    @pydantic.field_validator("columns")
    @classmethod
    def _columns_are_known(cls, columns: dict[str, str]) -> dict[str, str]:
        if unknown := sorted(set(columns) - set(COLUMNS)):
            raise ValueError(f"unknown names {unknown}; valid: {', '.join(COLUMNS)}")
        return columns

    @property
    def name(self) -> str:
        """What rows call it: the last part of the path."""
        return Path(self.path).name or self.path


# The two that everybody starts with, under the names everybody knows.
NAMED = {
    "sharegpt": {"path": "Aeala/ShareGPT_Vicuna_unfiltered"},
    "ultrachat": {"path": "HuggingFaceH4/ultrachat_200k", "split": "train_sft"},
}


def _hub_source(source: Source, workspace: Path) -> Source | None:
    """The hub's data set that `source` means, or None where it means files."""
    if find_input(source.path, workspace) is not None:
        return None
    if source.path in NAMED:
        chosen = source.model_dump(exclude_unset=True)
        return Source.model_validate({**chosen, **NAMED[source.path]})
    return source if _HUB_ID.fullmatch(source.path) else None


def is_on_hub(source: Source, workspace: Path) -> bool:
    """Whether `source` means a hub's data set, and no file in the workspace or here."""
    return _hub_source(source, workspace) is not None


def find_files(source: Source, workspace: Path, *, label: str) -> list[Path]:
    """The files of a source, sorted.

    Raises:
        UserError: there are none.
    """
    found = find_input(source.path, workspace)
    if found is not None and found.is_dir():
        paths = [path for path in found.rglob("*") if path.suffix in SUFFIXES and path.is_file()]
    elif found is not None:
        paths = [found]
    else:
        pattern = Path(source.path)
        roots = [Path("/")] if pattern.is_absolute() else [workspace, Path.cwd()]
        try:
            matches = (list(root.glob(str(pattern).lstrip("/"))) for root in roots)
            paths = next(filter(None, matches), [])
        except (OSError, ValueError, NotImplementedError):  # no pattern, or a name too long
            paths = []
    if not paths:
        raise UserError(
            f"{label}: expected a file, a folder with {', '.join(SUFFIXES)} files or a glob at "
            f"{workspace / source.path} or {Path(source.path).absolute()}, or a hub data set "
            "(owner/name), found none."
        )
    return sorted(paths)


def digest(source: Source, workspace: Path, *, label: str) -> str:
    """What a fingerprint needs to know: the files' content, or the hub's id and revision."""
    hub = _hub_source(source, workspace)
    if hub is not None:
        return f"{hub.path}@{hub.revision or 'latest'}/{hub.subset or ''}/{hub.split}"
    hashes = [files.sha256(path) for path in find_files(source, workspace, label=label)]
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_source(
    source: Source, workspace: Path, *, label: str = "prompts"
) -> Iterator[Prompt | BadRow]:
    """Every row of a source, in order; what is no prompt comes as a `BadRow`.

    Raises:
        UserError: nothing is there, or a file is not what its name says.
        RetryableError: the hub does not answer.
    """
    hub = _hub_source(source, workspace)
    if hub is not None:
        yield from _parsed(_hub_rows(hub, label), hub, hub.path)
        return
    for path in find_files(source, workspace, label=label):
        if path.suffix == ".parquet":
            yield from _parsed(_parquet_rows(path), source, path.name)
        elif path.suffix == ".json" and _is_list(path):
            yield from _parsed(_list_rows(path), source, path.name)
        else:
            yield from read_lines(path, source=source.name, columns=source.columns)


def _parsed(rows: Iterable[Any], source: Source, where: str) -> Iterator[Prompt | BadRow]:
    for number, row in enumerate(rows, start=1):
        try:
            yield parse_row(row, source=source.name, columns=source.columns)
        except Unusable as unusable:
            yield BadRow(f"{where} row {number}", unusable.reason, unusable.detail)


def _is_list(path: Path) -> bool:
    """Whether the file is one JSON list; files named .json often hold JSON lines."""
    files.require_file(path)
    with path.open("rb") as start:
        return start.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _list_rows(path: Path) -> Iterator[Any]:
    import ijson

    files.require_file(path)
    try:
        with path.open("rb") as content:
            yield from ijson.items(content, "item", use_float=True)
    except (ijson.JSONError, ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"{path}: expected one JSON list of rows, found it broken: {error}. Mend the file; as "
            "JSON lines, one broken row would cost only itself."
        ) from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files.require_file(path)
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                batch.validate(full=True)
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: expected a Parquet file, found {error}.") from error


def _hub_rows(source: Source, label: str) -> Iterable[Any]:
    import datasets
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return datasets.load_dataset(
            source.path, name=source.subset, split=source.split, revision=source.revision
        )
    except (datasets.exceptions.DatasetNotFoundError, RepositoryNotFoundError) as error:
        raise UserError(f"{label}: the hub has no data set {source.path}: {error}") from error
    except (RevisionNotFoundError, ValueError) as error:
        raise UserError(f"{label}: {source.path} on the hub: {error}") from error
    except (ConnectionError, OSError) as error:
        raise RetryableError(
            f"{label}: could not read {source.path} from the hub: {error}. Where there is no way "
            "out, download it elsewhere and give its files, or set HF_HUB_OFFLINE=1 with a cache."
        ) from error


def without_duplicates(
    rows: Iterable[Prompt | BadRow], *, same_content: bool = False
) -> Iterator[Prompt | BadRow]:
    """The rows, a second one with the same id as a BadRow; 16 bytes of hash a row are remembered.

    Args:
        same_content: whether a second row with the same turns and tools is a BadRow, too.
    """
    ids: set[int] = set()
    contents: set[int] = set()
    for row in rows:
        if not isinstance(row, Prompt):
            yield row
            continue
        own = short_hash(row.sample_id)
        content = int(row.content_hash(), 16) if same_content else None
        if own in ids:
            yield BadRow(row.sample_id, "duplicate_id", row.source)
        elif content in contents:
            yield BadRow(row.sample_id, "duplicate_content", row.source)
        else:
            ids.add(own)
            if content is not None:
                contents.add(content)
            yield row


def read_lines(
    path: Path, *, source: str = "", columns: Mapping[str, str] | None = None
) -> Iterator[Prompt | BadRow]:
    """Every non-blank JSON line of `path`, in order.

    Raises:
        UserError: the file cannot be read.
    """
    files.require_file(path)
    try:
        with path.open("rb") as content:
            for number, line in enumerate(_lines(content), start=1):
                if not line.strip():
                    continue
                try:
                    if len(line) > _LONGEST_LINE_BYTES:
                        raise Unusable("line_too_long", f"more than {_LONGEST_LINE_BYTES} bytes")
                    row = parse_line(line)
                    yield parse_row(row, source=source or path.name, columns=columns)
                except Unusable as unusable:
                    yield BadRow(f"{path.name} line {number}", unusable.reason, unusable.detail)
    except OSError as error:
        raise UserError(f"could not read prompts from {path}: {error.strerror}.") from error


def _lines(content: BinaryIO) -> Iterator[bytes]:
    """Lines; of one that is too long only its beginning, so that no line fills the memory."""
    while line := content.readline(_LONGEST_LINE_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = content.readline(_LONGEST_LINE_BYTES + 1)


def read_prompts(path: Path) -> Iterator[Prompt | BadRow]:
    """A JSON-lines file's prompts; a second row with the same id is a BadRow.

    Raises:
        UserError: the file cannot be read.
    """
    return without_duplicates(read_lines(path))
