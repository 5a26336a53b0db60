# SPDX-License-Identifier: Apache-2.0
"""Where prompts come from: files, folders, globs, data sets on a hub. Read as a stream.

What is not read is never lost from sight. A file in a folder whose format is unknown is reported as a
`BadRow` and counts as skipped; columns with text that nobody reads are named in the log.
"""

import collections
import functools
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pydantic

from shared.config import Section, identity
from shared.errors import UserError
from shared.io import files
from shared.paths import find_input, is_hub_id
from shared.prompts import folders, formats, hub
from shared.prompts.columns import COLUMNS
from shared.prompts.content import Unusable
from shared.prompts.rows import BadRow, Prompt, parse_row, short_hash
from shared.runtime.status import Accounting
from shared.runtime.wording import counted

logger = logging.getLogger(__name__)


class Source(Section):
    """One place that prompts come from."""

    path: str = identity(
        ..., "File, folder, glob (workspace first), hub data set, or one of: sharegpt, ultrachat."
    )
    columns: dict[str, str] = identity(
        {}, f"Columns with other names than usual ({', '.join(COLUMNS)}): our name -> the column."
    )
    split: str | None = identity(
        None, "Split to read, or all. Default: the only one; of a hub data set, train."
    )
    subset: str | None = identity(None, "Configuration of a hub data set, or of a clone of one.")
    revision: str | None = identity(None, "Revision of a hub data set.")

    @pydantic.field_validator("columns")
    @classmethod
    def _columns_are_known(cls, columns: dict[str, str]) -> dict[str, str]:
        if unknown := sorted(set(columns) - set(COLUMNS)):
            raise ValueError(f"unknown names {unknown}; valid: {', '.join(COLUMNS)}")
        return columns

    @property
    def name(self) -> str:
        """The source's name in rows and logs: the last part of the path."""
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
        chosen = source.model_dump(exclude_unset=True, exclude={"path"})
        return Source.model_validate({**NAMED[source.path], **chosen})
    # `data/mine.jsonl` has the form of a hub's id, too, and is a path with a mistake.
    is_id = is_hub_id(source.path) and not formats.is_data(Path(source.path))
    return source if is_id else None


def is_on_hub(source: Source, workspace: Path) -> bool:
    """Whether `source` means a hub's data set, and no file in the workspace or here."""
    return _hub_source(source, workspace) is not None


def require_answer(source: Source, workspace: Path, *, label: str) -> None:
    """Ask the hub once for a data set of its own; of files nothing is asked.

    Raises:
        UserError, RetryableError: as `hub.require_answer`.
    """
    if on_hub := _hub_source(source, workspace):
        hub.require_answer(on_hub.path, on_hub.revision, label=label)


def find_files(source: Source, workspace: Path, *, label: str) -> list[Path]:
    """The files of a source, sorted.

    Raises:
        UserError: there are none, or the recipe must say which split.
    """
    found, _ = _found(source, workspace, label)
    return [each.path for each in found]


def _require_files_alone(source: Source, workspace: Path, label: str) -> None:
    """Refuse what only a hub's data set has; a clone of one has its subsets.

    Raises:
        UserError: a source of files has a subset or a revision.
    """
    found = find_input(source.path, workspace)
    names = ("revision",) if found is not None and found.is_dir() else ("subset", "revision")
    given = [name for name in names if getattr(source, name) is not None]
    if given:
        raise UserError(
            f"{label}: {source.path}: expected no {given[0]} of files here, found "
            f"{getattr(source, given[0])!r}.",
            code="prompts-no-subset",
            remedy="Take it out; give the folder of one subset as the path. A data set on the hub is "
            "owner/name.",
            facts={"path": source.path, "setting": given[0]},
        )


def _found(
    source: Source, workspace: Path, label: str
) -> tuple[list[folders.DataFile], list[folders.DataFile]]:
    _require_files_alone(source, workspace, label)
    return folders.find(source.path, source.split, workspace, label=label, subset=source.subset)


def digest(source: Source, workspace: Path, *, label: str) -> str:
    """The source in a fingerprint: a hash of the files' content, or the hub's id and revision."""
    on_hub = _hub_source(source, workspace)
    if on_hub is not None:
        split = on_hub.split or "train"
        return f"{on_hub.path}@{on_hub.revision or 'latest'}/{on_hub.subset or ''}/{split}"
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
    on_hub = _hub_source(source, workspace)
    if on_hub is None:
        rows = file_rows(source, workspace, label)
    else:
        read = hub.rows(
            on_hub.path,
            subset=on_hub.subset,
            split=on_hub.split,
            revision=on_hub.revision,
            label=label,
        )
        rows = _parsed(read, on_hub.path, source.name, source.columns)
    unread: collections.Counter[str] = collections.Counter()
    try:
        for row in rows:
            if isinstance(row, Prompt):
                unread.update(row.unread)
            yield row
    finally:
        if unread:
            named = ", ".join(
                f"{name!r} ({counted(count, 'row')})" for name, count in unread.most_common(12)
            )
            _warn(f"{label}: {source.path}: text that is not read: {named}. `columns` maps names.")


@functools.cache  # a stage reads its sources twice
def _warn(text: str) -> None:
    logger.warning("%s", text)


def file_rows(source: Source, workspace: Path, label: str) -> Iterator[Prompt | BadRow]:
    """`read_source` of files, without its warning: for a look at the first rows.

    Raises:
        UserError: as `read_source`.
    """
    found, unread = _found(source, workspace, label)
    for each in unread:
        yield BadRow(each.name, "file_not_read", each.why_not)
    rows = (_parsed(formats.rows(f.path), f.name, source.name, source.columns) for f in found)
    yield from _apart(found, rows) if len(found) > 1 else next(rows)


def _apart(
    found: Iterable[folders.DataFile], streams: Iterable[Iterator[Prompt | BadRow]]
) -> Iterator[Prompt | BadRow]:
    """The files' rows; where a file uses an earlier file's id for another row, its name goes before it.

    Many data sets count from 0 in each file. 16 bytes of hash a row are remembered.
    """
    contents: dict[int, int] = {}
    for file, rows in zip(found, streams, strict=True):
        own: set[int] = set()
        for row in rows:
            if isinstance(row, Prompt):
                key, content = short_hash(row.sample_id), int(row.content_hash(), 16)
                if contents.setdefault(key, content) != content and key not in own:
                    row = row.renamed(f"{file.name}:{row.sample_id}")
                else:
                    own.add(key)
            yield row


def _parsed(
    rows: Iterable[formats.Row], where: str, source: str, columns: Mapping[str, str]
) -> Iterator[Prompt | BadRow]:
    for position, value in rows:
        try:
            if isinstance(value, Unusable):
                raise value
            yield parse_row(value, source=source, columns=columns)
        except Unusable as unusable:
            yield BadRow(f"{where} {position}", unusable.reason, unusable.detail)


class Duplicates:
    """Reports rows that come again, over any number of streams; two hashes a row are remembered.

    A row with an earlier row's id and other content is no duplicate (data sets of several answers to a
    prompt repeat its id): it gets the content's hash behind its id.

    Args:
        same_content: whether a second row with the same turns and tools is a duplicate as well.
    """

    def __init__(self, *, same_content: bool = False) -> None:
        self._same_content = same_content
        self._contents_of: dict[int, int] = {}  # id -> content
        self._contents: set[int] = set()

    def marked(self, rows: Iterable[Prompt | BadRow]) -> Iterator[Prompt | BadRow]:
        """The rows; a duplicate as a BadRow."""
        for row in rows:
            yield self._checked(row) if isinstance(row, Prompt) else row

    def _checked(self, row: Prompt) -> Prompt | BadRow:
        own_id, digest = row.sample_id, row.content_hash()
        content = int(digest, 16)
        if self._contents_of.get(short_hash(own_id), content) != content:
            row = row.renamed(f"{own_id}#{digest}")
        key = short_hash(row.sample_id)
        if key in self._contents_of:
            return BadRow(own_id, "duplicate_id", row.source)
        if self._same_content:
            if content in self._contents:
                return BadRow(own_id, "duplicate_content", row.source)
            self._contents.add(content)
        self._contents_of[key] = content
        return row


def without_duplicates(rows: Iterable[Prompt | BadRow]) -> Iterator[Prompt | BadRow]:
    """The rows, one that comes again under its id as a BadRow."""
    return Duplicates().marked(rows)


def usable(rows: Iterable[Prompt | BadRow], accounting: Accounting) -> Iterator[Prompt]:
    """The prompts among the rows; the others are accounted for."""
    for row in rows:
        if isinstance(row, Prompt):
            yield row
        else:
            account = accounting.skip if row.is_skipped else accounting.fail
            account(row.row, row.reason, row.detail)
