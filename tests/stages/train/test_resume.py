# SPDX-License-Identifier: Apache-2.0
"""dump and train as processes that were killed or stopped: the next ones end with the same results."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from shared.artifacts.artifact import Artifact
from shared.settings import build
from stages.train import run as train_run
from stages.train.config import TrainConfig
from tests.runs import run, write_recipe
from tests.stages.train.trainings import (
    TRAIN,
    furthest,
    interrupt_after_a_checkpoint,
    kill_ranks_at,
    losses,
    start_ranks,
)

# Of losses from 8 down to 0.001: sums in another order, of bfloat16 products where a processor has them.
CURVE = 1e-4


def test_a_killed_dump_continues_to_the_same_bytes(workspace: Path) -> None:
    folder = workspace / "run" / "dump"
    shards = sorted(folder.glob("shard_*.pt"))
    before = {path: path.read_bytes() for path in shards}
    kept = shards[0].stat().st_mtime_ns
    # What kill -9 leaves: no manifest, a shard without its sidecar, and half a file.
    (folder / "manifest.json").unlink()
    shards[2].with_suffix(".json").unlink()
    shards[3].unlink()
    (folder / ".shard_00003.pt.tmp-1").write_bytes(b"half")
    done = run(workspace, "dump")
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in shards} == before
    assert shards[0].stat().st_mtime_ns == kept
    assert not list(folder.glob(".*.tmp-*"))


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_an_interrupted_training_ends_with_the_same_weights(
    workspace: Path, trained: Path, how: signal.Signals, code: int
) -> None:
    export = workspace / "run" / "export"
    shutil.copytree(trained / "run" / "export", export)  # of an earlier training, that is gone
    assert interrupt_after_a_checkpoint(workspace, how) == code
    assert not (workspace / "run" / "train" / "manifest.json").exists()
    assert not (export / "manifest.json").exists(), "its weights are not those to come"
    again = run(workspace, "train")
    assert again.returncode == 0, again.stderr
    assert "continuing from step" in again.stderr
    assert furthest(trained, workspace) == 0.0
    histories = [w / "run" / "train" / "history.jsonl" for w in (workspace, trained)]
    assert histories[0].read_text() == histories[1].read_text()
    tokens = [
        json.loads((w / "run" / "train" / "manifest.json").read_text())["facts"]["tokens"]
        for w in (workspace, trained)
    ]
    assert tokens[0] == tokens[1], "of all steps, those before the interruption too"


def test_an_interrupted_training_by_muon_does_so_too(workspace: Path, tmp_path: Path) -> None:
    write_recipe(workspace, **TRAIN, optimizer="muon")
    whole = tmp_path / "whole"
    shutil.copytree(workspace, whole)
    assert run(whole, "train").returncode == 0
    assert interrupt_after_a_checkpoint(workspace, signal.SIGKILL) == -9
    assert run(workspace, "train").returncode == 0
    assert furthest(whole, workspace) == 0.0


@pytest.mark.soak
def test_several_threads_end_with_the_same_weights_too(
    workspace: Path, dumped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    whole = tmp_path / "whole"
    shutil.copytree(dumped, whole)
    write_recipe(whole, **TRAIN)
    assert run(whole, "train").returncode == 0
    interrupt_after_a_checkpoint(workspace, signal.SIGKILL)
    assert run(workspace, "train").returncode == 0
    assert furthest(whole, workspace) == 0.0


def test_a_training_that_was_killed_before_its_manifest_is_finished_by_the_next(
    workspace: Path, trained: Path
) -> None:
    shutil.rmtree(workspace / "run")
    shutil.copytree(trained / "run", workspace / "run", symlinks=True)
    (workspace / "run" / "train" / "manifest.json").unlink()
    again = run(workspace, "train")
    assert again.returncode == 0, again.stderr
    facts = [
        json.loads((w / "run" / "train" / "manifest.json").read_text())["facts"]
        for w in (workspace, trained)
    ]
    assert {**facts[0], "seconds": 0} == {**facts[1], "seconds": 0}


def test_another_number_of_threads_goes_on_with_the_same_curve(
    workspace: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after_a_checkpoint(workspace, signal.SIGKILL)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert run(workspace, "train").returncode == 0
    assert losses(workspace) == pytest.approx(losses(trained), rel=1e-3, abs=CURVE)


def test_other_numbers_of_ranks_go_on_with_the_same_curve(workspace: Path, trained: Path) -> None:
    """Two ranks, killed; one, killed; two to the end."""
    for num_ranks, step in ((2, 12), (1, 40)):
        kill_ranks_at(workspace, num_ranks, step)
    assert [process.wait(timeout=200) for process in start_ranks(workspace, 2)] == [0, 0]
    assert len(losses(trained)) > 5
    assert losses(workspace) == pytest.approx(losses(trained), rel=1e-3, abs=CURVE)


def test_what_another_process_finished_is_not_trained_again(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock was held, and the training finished, between the first look and the second."""
    looks = iter([False])
    is_done = Artifact.is_done
    monkeypatch.setattr(Artifact, "is_done", lambda own: next(looks, None) is None and is_done(own))
    monkeypatch.setattr(train_run, "_train", lambda *_: pytest.fail("trained again"))
    recipe = str(trained / "recipe.yaml")
    train_run.run(build(TrainConfig, {"recipe": recipe, "workspace": str(trained)}))
