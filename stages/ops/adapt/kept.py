# SPDX-License-Identifier: Apache-2.0
"""The split that a run was begun with: kept until `--overwrite`, so that traffic may grow meanwhile.

A live server's log is another file each time it is looked at. `split.json` beside the rows says what they
were made of; the same command takes them as they are, and tells how many chats have come since.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from shared.artifacts.manifest import differences
from shared.errors import EyrieError, UserError
from shared.io import files
from shared.io.records import Shape, read_record
from shared.prompts.rows import Prompt, parse_row
from shared.runtime.wording import counted
from stages.ops.adapt import traffic
from stages.ops.adapt.room import Room
from stages.ops.adapt.server_log import Rendering
from stages.ops.adapt.traffic import HELD_OUT, TRAIN, Split

RECORD = "split.json"
_ROWS = (TRAIN, HELD_OUT)
_ANEW = "Give --overwrite to split the traffic anew."

logger = logging.getLogger(__name__)


class _MadeOf(Shape):
    """The traffic; its settings stand beside it."""

    traffic: str
    digest: str


class _Counts(Shape):
    """As `Split.counts`."""

    train: int
    held_out: int
    left_out: int


class _Record(Shape):
    """`split.json`; those of earlier versions have no hashes of the rows."""

    made_of: _MadeOf
    counts: _Counts
    too_many: int
    files: dict[str, str] = pydantic.Field(default_factory=dict)


@dataclass(frozen=True)
class Traffic:
    """Traffic, and how it is to be split."""

    name: str
    workspace: Path
    max_rows: int
    room: Room

    def settings(self) -> dict[str, Any]:
        """What decides about the rows, beside the traffic's content."""
        kwargs = self.room.run.template_kwargs
        return {"max_rows": self.max_rows, "template_kwargs": kwargs, "bench": self.room.as_dict()}

    def digest(self) -> str:
        """A hash of the traffic as it is now.

        Raises:
            UserError: there is none.
        """
        return traffic.digest(self.name, self.workspace)

    def chats(self) -> list[Prompt]:
        """The different chats of the traffic as it is now.

        Raises:
            UserError: it cannot be read.
        """
        rendering = Rendering(self.room.run.template_kwargs, self.room.variables)
        return traffic.chats(self.name, self.workspace, rendering)[0]

    def split(self, folder: Path) -> Split:
        """Split the traffic into `folder`.

        Raises:
            UserError: as `traffic.split`.
        """
        digest = self.digest()  # before the rows are read: a log grows meanwhile
        found = traffic.split(
            self.name,
            self.workspace,
            folder,
            max_rows=self.max_rows,
            template_kwargs=self.room.run.template_kwargs,
            variables=self.room.variables,
            fits=self.room.fits,
        )
        record = {
            "made_of": {"traffic": self.name, "digest": digest, **self.settings()},
            "counts": found.counts,
            "too_many": found.too_many,
            "files": {name: files.sha256(folder / name) for name in _ROWS},
        }
        files.write_json(folder / RECORD, record)
        return found


def kept(asked: Traffic, folder: Path) -> Split | None:
    """The split that lies in `folder`; None where there is none.

    Raises:
        UserError: it is one of other traffic, or of other settings; or its files were changed since.
    """
    if not all((folder / name).exists() for name in (RECORD, *_ROWS)):
        return None
    record = read_record(folder / RECORD, _Record, remedy=_ANEW)
    found, made_of = Split(folder, record["counts"], record["too_many"]), dict(record["made_of"])
    name, digest = made_of.pop("traffic"), made_of.pop("digest")
    now = _digest(asked)
    differing = differences(made_of, asked.settings())
    if asked.name != name and now != digest:
        differing = f"--traffic: was {name}, now {asked.name}"
    if differing:
        raise UserError(
            f"{folder}: expected the traffic and the settings that this run was begun with, found others "
            f"({differing}).",
            code="split-settings",
            remedy="Give --overwrite to begin anew, or another run.name to keep both.",
            facts={"folder": str(folder)},
        )
    _require_unchanged(folder, record.get("files", {}))
    logger.info("the split in %s is kept: %s", folder, found.summary())
    if now != digest:
        _tell_news(asked, found)
    return found


def _require_unchanged(folder: Path, hashes: Mapping[str, str]) -> None:
    """Refuse rows that were edited or cut: both heads are compared on these, and the counts are of these.

    Raises:
        UserError: with the file that is another one.
    """
    for name, expected in hashes.items():
        if (found := files.sha256(folder / name)) != expected:
            raise UserError(
                f"{folder / name}: expected the rows that the traffic was split into (sha256 "
                f"{expected[:12]}), found others ({found[:12]}).",
                code="split-rows-changed",
                remedy=f"Restore the file. {_ANEW}",
                facts={"path": str(folder / name)},
            )


def _digest(asked: Traffic) -> str:
    """A hash of the traffic as it is now; '' where it is gone, which ends no run that has its rows."""
    try:
        return asked.digest()
    except EyrieError:
        return ""


def _tell_news(asked: Traffic, found: Split) -> None:
    """Say how many chats have come since the split."""
    try:
        now = asked.chats()
        taken = {
            parse_row(json.loads(line)).content_hash()
            for side in (found.train, found.held_out)
            for line in files.read_text(side).splitlines()
        }
    except (EyrieError, ValueError) as error:  # gone, or rows that an earlier version did not hash
        logger.warning("what has come since the split is not known, nor needed: %s", error)
        return
    news = sum(each.content_hash() not in taken for each in now) - found.too_many
    if news > 0:
        logger.warning(
            "%s: what came since it was split is not taken, %s; --overwrite, or another run.name, "
            "takes it",
            asked.name,
            counted(news, "chat"),
        )


def place(found: Split, folder: Path) -> Split:
    """The same split in `folder`; its record comes last."""
    if found.folder == folder:
        return found
    files.unlink(folder, RECORD)
    for name in (*_ROWS, RECORD):
        with files.atomic_path(folder / name) as temporary:
            shutil.copyfile(found.folder / name, temporary)
    return Split(folder, found.counts, found.too_many)
