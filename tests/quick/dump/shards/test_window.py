# SPDX-License-Identifier: Apache-2.0
"""A window of shards: how much lies on the disk, and that nothing goes that train may still need."""

import random
from pathlib import Path

import pytest

from shared.artifacts.window import Reading, sidecar
from shared.io import files
from shared.runtime.status import Status
from shared.settings import build
from stages.dump.config import DumpConfig
from stages.dump.plan import Plan, ShardPlan
from stages.dump.shards import window as windows

SHARDS, DUMP = 9, "its fingerprint"
OF_SIDECAR = {"rows": "", "tokens": 1, "hits": 1, "positions": 1, "logprob_gap": None, "failed": []}


class Bed:
    """dump's folder with a window of `window_shards`, and what train says."""

    def __init__(self, workspace: Path, window_shards: int) -> None:
        given = {"target": "t", "workspace": str(workspace), "window_shards": str(window_shards)}
        config = build(DumpConfig, given)
        self.folder, self._train = config.paths.stage("dump"), config.paths.stage("train")
        self.folder.mkdir(parents=True)
        shards = [ShardPlan(index, index, 1, 1, "", Path()) for index in range(SHARDS)]
        status = Status(config.paths.status("dump"))
        self.window = windows.Window(self.folder, config, Plan(shards, {}, "hf"), DUMP, status)

    def says(self, kept: list[int], order: list[int], done: int) -> None:
        Reading(DUMP, kept, order, done).write(self._train)

    def make(self, index: int) -> None:
        name = f"shard_{index:05d}.pt"
        (self.folder / name).write_bytes(b"states")
        record = {**OF_SIDECAR, "files": {name: {"bytes": 6, "sha256": "0" * 64}}}
        files.write_json(sidecar(self.folder, index), record)

    def present(self) -> set[int]:
        return {int(path.stem[6:]) for path in self.folder.glob("shard_*.pt")}


@pytest.mark.parametrize("seed", range(6))
def test_shards_that_no_checkpoint_covers_stay_and_the_window_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(windows, "_POLL_S", 0)
    source = random.Random(seed)
    kept = source.sample(range(SHARDS), source.randint(0, 2))
    order = [n for _ in range(2) for n in source.sample(range(SHARDS), SHARDS) if n not in kept]
    room = source.randint(2, 4)
    bed, done = Bed(tmp_path, len(kept) + room), 0
    bed.says(kept, order, done)

    def train_saves() -> None:
        """As it does once dump waits for it; sometimes it has lost its last checkpoint."""
        nonlocal done
        assert bed.present() >= {*kept, *order[done : done + room]}
        done = min(len(order), done + source.randint(1, room))
        if source.random() < 0.2:
            done = max(0, done - source.randint(1, 3))
        bed.says(kept, order, done)

    for group in bed.window.groups(train_saves):
        before = bed.present()
        for shard in group:
            needed = {*kept, *order[done : done + room]}
            assert before & needed <= bed.present()
            bed.make(shard.index)
            before = bed.present()
            assert len(before) <= len(kept) + room
    assert bed.window.missing() == []


def test_nothing_goes_while_the_window_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "_POLL_S", 0)
    bed, done, order = Bed(tmp_path, 7), 0, [5, 4, 3, 2, 1, 0]
    bed.says([6], order, done)

    def train_saves() -> None:
        nonlocal done
        done += 2
        bed.says([6], order, done)

    for group in bed.window.groups(train_saves):
        for shard in group:
            bed.make(shard.index)
    assert bed.present() == set(range(7))
    bed.says([6], [5, 4, 3, 2, 1, 0, 8], 3)
    next(next(bed.window.groups(train_saves)))
    assert bed.present() == {6, 3, 2, 1, 0, 4}  # of the three that were read, two have room


def test_a_shard_that_is_gone_before_it_was_seen_whole_is_made_again(tmp_path: Path) -> None:
    bed, order, made = Bed(tmp_path, 2), [1, 2, 1], list[int]()
    bed.says([], order, 0)

    def train_waits() -> None:
        raise AssertionError(f"dump waits after {made}, and so would train")

    for shard in next(bed.window.groups(train_waits)):
        made.append(shard.index)
        bed.make(shard.index)
        if len(made) == 1:  # read, covered, and removed by another process
            bed.says([], order, 1)
            (bed.folder / "shard_00001.pt").unlink()
    assert made == [1, 2, 1]


def test_what_another_process_makes_for_a_later_word_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bed = Bed(tmp_path, 5)
    order = [1, 2, 3, 4, 5, 6, 7, 8]
    bed.says([0], order, 0)
    for index in range(5):
        bed.make(index)
    list_folder = Path.glob

    def glob(folder: Path, pattern: str) -> list[Path]:
        """Before it is listed, train says more, and another process hears that first."""
        bed.says([0], order, 3)
        bed.make(6)
        return list(list_folder(folder, pattern))

    monkeypatch.setattr(Path, "glob", glob)
    bed.window._make_room()
    monkeypatch.undo()
    assert bed.present() == {0, 4, 6}
