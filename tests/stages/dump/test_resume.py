# SPDX-License-Identifier: Apache-2.0
"""A dump that was killed, or whose files changed or went since: the next makes the same bytes, or refuses."""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from shared.artifacts.manifest import MANIFEST
from shared.contracts import hidden_states
from shared.errors import OutputError, RetryableError, UserError
from stages.dump.run import run as dump
from stages.dump.shards.filling import FillingShard
from stages.dump.shards.writer import ShardWriter
from tests.runs import ROOT, command
from tests.stages.dump.dumps import NUM_ROWS, config, contents, samples_dump


@pytest.mark.parametrize("layout", ["shards", "samples"])
def test_killed_at_three_random_moments_every_sample_is_there_once(
    workspace: Path, whole: Path, layout: str, tmp_path: Path
) -> None:
    """kill -9 while shards are written, three times; then the run ends with the same bytes."""
    rng = random.Random(layout)
    folder = workspace / "run" / "dump"
    words = command(workspace, "dump", "--layout", layout)
    for _ in range(3):
        before = len(list(folder.glob("shard_*.json")))
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 100
        # From the first shard on, which takes the longest: the model is loaded by then.
        while len(list(folder.glob("shard_*.json"))) == before and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert not list(folder.rglob(".*.tmp-*"))
    if layout == "shards":
        assert contents(folder) == contents(whole)
        return
    shutil.copytree(folder.parents[1], tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "run" / "dump")
    undisturbed = samples_dump(tmp_path / "again")
    names = [hidden_states.sample_name(index) for index in range(NUM_ROWS)]
    assert sorted(folder.rglob("data_*.pt")) == sorted(folder / name for name in names)
    for name in names:
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.parametrize("gone", ["shard_00002.pt", "shard_00003.json", "data_config.json"])
def test_what_is_gone_from_a_finished_dump_is_made_again(
    workspace: Path, whole: Path, gone: str
) -> None:
    folder = workspace / "run" / "dump"
    shutil.copytree(whole, folder)
    (folder / gone).unlink()
    dump(config(workspace))
    assert contents(folder) == contents(whole)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_answers_that_changed_since_are_refused(workspace: Path) -> None:
    (part,) = (workspace / "run" / "synth").glob("part-*.parquet")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match=rf"{part.name}: expected the SHA-256"):
        dump(config(workspace))


@pytest.mark.parametrize("gone", ["shard_00002.pt", "plan/shard_00004.parquet"])
def test_what_is_removed_while_a_dump_runs_is_made_by_the_next(
    workspace: Path, whole: Path, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = workspace / "run" / "dump"

    def removing(self: ShardWriter, shard: FillingShard) -> None:
        write(self, shard)
        if shard.plan.index == 2:
            (folder / gone).unlink()

    write = ShardWriter._write
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_write", removing)
        with pytest.raises(RetryableError, match=f"{Path(gone).stem}.*removed"):
            dump(config(workspace))
    assert not (folder / MANIFEST).exists()
    dump(config(workspace))
    assert contents(folder) == contents(whole)


def test_a_plan_that_a_kill_left_behind_is_forgotten(workspace: Path, whole: Path) -> None:
    folder = workspace / "run" / "dump"
    shutil.copytree(whole, folder)
    (folder / "plan").mkdir()
    dump(config(workspace))
    assert not (folder / "plan").exists()


def test_states_that_fail_leave_nothing_of_their_shard(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = FillingShard.put

    def stale(self: FillingShard, row: int, captured: Any) -> None:
        """The states of the row before: what a mix-up of requests gives."""
        put(self, (row + 1) % self.plan.samples, captured)

    monkeypatch.setattr(FillingShard, "put", stale)
    with pytest.raises(OutputError, match="looks like mixed-up requests"):
        dump(config(workspace))
    assert not list((workspace / "run" / "dump").glob("shard_*"))


def test_before_anything_is_captured_the_recipe_may_change(
    workspace: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the engine refuses the target, and its message names another setting to try."""

    def refuse(*_: Any) -> None:
        raise UserError("no hooks")

    with monkeypatch.context() as patch:
        patch.setattr("stages.dump.backends.choose.open_backend", refuse)
        with pytest.raises(UserError, match="no hooks"):
            dump(config(workspace, shard_bytes=300_000))
    dump(config(workspace))
    assert contents(workspace / "run" / "dump") == contents(whole)
