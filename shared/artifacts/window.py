# SPDX-License-Identifier: Apache-2.0
"""dump and train at the same time: what each tells the other, in files that are written whole.

    <run>/dump/window.json        by dump, before any state exists: a manifest of what it will make
    <run>/dump/window_rows.json   by dump: the samples of each shard, and their lengths in tokens
    <run>/train/reading.json      by train: which shards it wants, in which order, and how far its
                                  last checkpoint is

`reading.json` alone decides what dump makes and removes. Train writes it after the checkpoint that
it speaks of is on the disk, so a shard that a resumed training needs is never removed. Dump keeps no
position of its own: after a kill it compares the file with what lies in its folder.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from pydantic import Field

from shared.artifacts.checksums import first_changed
from shared.artifacts.manifest_shape import Count, Entry, FileName
from shared.errors import UserError
from shared.io import files
from shared.io.records import Shape, read_record, read_record_if_there

OFFER = "window.json"
ROWS = "window_rows.json"
READING = "reading.json"


class _Rows(Shape):
    sample_ids: list[list[str]]
    lengths: list[list[Count]]


class _Reading(Shape):
    dump: str
    kept: list[Count]
    order: list[Count]
    next_visit: Count = Field(alias="next")


class _Sidecar(Shape):
    files: dict[FileName, Entry]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What train wants of dump.

    Attributes:
        dump: fingerprint of the dump that it is for.
        kept: shards with held-out samples; they stay, and come first.
        order: the other shards in the order in which they are read; with several epochs a shard is
            there several times.
        next: the first place in `order` that the last checkpoint does not cover.
    """

    dump: str
    kept: list[int]
    order: list[int]
    next: int

    def write(self, train_folder: Path) -> None:
        files.write_json(train_folder / READING, dataclasses.asdict(self))


def read_reading(train_folder: Path, dump: str, num_shards: int) -> Reading | None:
    """What train wants of the dump with this fingerprint, or None where it has not said so.

    Raises:
        UserError: the file is no such record, or names shards that the dump does not have.
    """
    path = train_folder / READING
    raw = read_record_if_there(path, _Reading, remedy="Delete it and run train again.")
    if raw is None or raw["dump"] != dump:
        return None
    reading = Reading(raw["dump"], raw["kept"], raw["order"], raw["next"])
    if max([*reading.kept, *reading.order], default=0) >= num_shards:
        raise UserError(
            f"{path}: expected shards below {num_shards}, found others.",
            code="reading-shards",
            remedy="Delete it and run train again.",
            facts={"file": str(path)},
        )
    return reading


def write_rows(folder: Path, sample_ids: list[list[str]], lengths: list[list[int]]) -> None:
    """Write the samples of each shard and their lengths in tokens."""
    files.write_json(folder / ROWS, {"sample_ids": sample_ids, "lengths": lengths})


def read_rows(folder: Path) -> tuple[list[list[str]], list[list[int]]]:
    """The sample ids of each shard, and their lengths in tokens.

    Raises:
        UserError: missing, or not such a record.
    """
    raw = read_record(folder / ROWS, _Rows, remedy="Delete it and run dump again.")
    return raw["sample_ids"], raw["lengths"]


def sidecar(folder: Path, index: int) -> Path:
    """The small file beside a shard that describes it: a shard without it is not whole."""
    return folder / f"shard_{index:05d}.json"


def whole_shard(folder: Path, index: int) -> dict[str, Any] | None:
    """The files of a whole shard, name -> size and checksum; None where it is not there.

    Raises:
        UserError: its sidecar is no such record.
    """
    path = sidecar(folder, index)
    found = read_record_if_there(path, _Sidecar, remedy="Delete it and run dump again.")
    if found is None or first_changed(folder, found) is not None:
        return None
    return dict(found["files"])


def sample_hash(sample_id: str) -> str:
    """The order in which samples are held out, and in which dump cuts shards for a window."""
    return hashlib.sha256(sample_id.encode()).hexdigest()
