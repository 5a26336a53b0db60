# SPDX-License-Identifier: Apache-2.0
"""dump and train at the same time, before the chain starts: what they need, and what they take."""

from pathlib import Path

from shared.artifacts.artifact import Artifact
from shared.paths import RunPaths
from shared.settings import build
from stages.ops.chain import estimates, pair
from stages.ops.chain.machine import Machine
from stages.ops.chain.rows import Looks
from stages.synth.config import SynthConfig
from tests.quick.ops.chain.recipes import CPU, GIB, problems, steps, write


def test_a_window_and_a_follower_need_each_other(workspace: Path) -> None:
    window, follow = {"window_shards": 4}, {"follow": True}
    assert problems(steps(workspace, {"dump": window, "train": follow}), workspace) == []
    (alone,) = problems(steps(workspace, {"dump": window}), workspace)
    assert "train.follow: true" in alone
    (other,) = problems(steps(workspace, {"train": follow}), workspace)
    assert "expected dump.window_shards" in other
    one_gpu = Machine((("H100", 80 * GIB),), 64 * GIB, GIB)
    found = problems(steps(workspace, {"dump": window, "train": follow}), workspace, one_gpu)
    assert any("expected 2 GPUs" in line for line in found)


def test_the_two_run_together_and_share_the_cores(workspace: Path) -> None:
    path = write(workspace, {"dump": {"window_shards": 4}, "train": {"follow": True}})
    assert pair.groups(("synth", "dump", "train", "bench"), path) == [
        ("synth",),
        ("dump", "train"),
        ("bench",),
    ]
    assert pair.groups(("train", "bench"), path) == [("train",), ("bench",)]
    assert [list(pair.cores(stage, [0, 1, 2])) for stage in ("dump", "train")] == [[0], [1, 2]]
    assert list(pair.cores("dump", [5])) == [5]


def test_a_window_bounds_the_disk_and_says_how_often_rows_are_computed(workspace: Path) -> None:
    settings = {
        "dump": {"window_shards": 2, "shard_bytes": 10_000},
        "train": {"follow": True, "epochs": 3},
    }
    found = estimates.Estimates(
        steps(workspace, settings), RunPaths(workspace, "run"), CPU, Looks(workspace)
    ).rows()
    dump = next(each for each in found if each.stage == "dump")
    assert "at most 20" in dump.disk and "without a window" in dump.disk
    assert "3 prefills of each" in dump.work


def test_states_that_no_disk_holds_pass_through_a_window(workspace: Path) -> None:
    paths, flags = RunPaths(workspace, "run"), {"workspace": str(workspace)}
    paths.stage("synth").mkdir(parents=True)
    synth = build(SynthConfig, {**flags, "recipe": str(workspace / "recipe.yaml")})
    rows = {"in": 5, "ok": 5, "skipped": {}, "failed": {}}
    Artifact(paths.stage("synth"), synth).finish([], counts=rows, facts={"tokens": 10**15})
    (disk,) = problems(steps(workspace), workspace)
    assert disk.startswith("disk: expected 512000")
    window, follow = {"window_shards": 4}, {"follow": True}
    assert problems(steps(workspace, {"dump": window, "train": follow}), workspace) == []
