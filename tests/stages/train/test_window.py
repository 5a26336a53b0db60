# SPDX-License-Identifier: Apache-2.0
"""dump with a window and train beside it: the same weights, on a disk that holds a few shards."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests import runs
from tests.faults import windows

SHARDS, WINDOW = 40, windows.WINDOW


def run(workspace: Path, *flags: str) -> "subprocess.Popen[bytes]":
    """`ops run` of dump and train, at the same time; what it says goes into the file `said`."""
    words = ["--recipe", str(workspace / "recipe.yaml"), "--workspace", str(workspace), *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "stages.ops", "run", "--only", "dump,train", *words],
        cwd=runs.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(workspace / "said").open("w"),
    )


def watched(process: "subprocess.Popen[bytes]", workspace: Path) -> int:
    """Wait for its end; the most bytes of states that lay in dump's folder at a time."""
    most = 0
    while process.poll() is None:
        size = 0
        for path in (workspace / "run/dump").glob("*shard_*.pt*"):
            try:
                size += path.stat().st_size
            except FileNotFoundError:
                continue
        most = max(most, size)
        time.sleep(0.005)
    assert process.returncode == 0, (workspace / "said").read_text()[-2000:]
    return most


def workspace_of(
    folder: Path, window_shards: int, *, shards: int = SHARDS, **train: object
) -> Path:
    runs.make_synth(folder, num_rows=2 * shards)
    windows.write_recipe(folder, window_shards=window_shards, epochs=1, patience_s=300, **train)
    return folder


def require_valid(workspace: Path) -> None:
    """`ops validate` has nothing against dump's artifact."""
    words = ["validate", str(workspace / "run"), "--only", "dump"]
    asked = subprocess.run(
        [sys.executable, "-m", "stages.ops", *words], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stdout + asked.stderr


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose window has room for all shards."""
    workspace = workspace_of(tmp_path_factory.mktemp("kept"), 1000)
    watched(run(workspace), workspace)
    return workspace


def test_a_small_window_gives_the_same_weights_and_needs_little_disk(
    kept: Path, tmp_path: Path
) -> None:
    workspace = workspace_of(tmp_path, WINDOW)
    most = watched(run(workspace), workspace)
    shards = [path.stat().st_size for path in (kept / "run/dump").glob("shard_*.pt")]
    assert len(shards) == SHARDS
    assert most <= (WINDOW + 1) * max(shards)
    ours, theirs = (
        torch.load(each / "run/train/checkpoints/latest.pt", weights_only=True)["weights"]
        for each in (workspace, kept)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    require_valid(workspace)


def test_a_training_that_ends_early_leaves_a_valid_dump(tmp_path: Path) -> None:
    shards = 16
    workspace = workspace_of(
        tmp_path,
        WINDOW,
        shards=shards,
        eval_every_steps=1,
        plateau_fraction=0.25,
        learning_rate=1e-9,
    )
    watched(run(workspace), workspace)
    assert len(list((workspace / "run/dump").glob("shard_*.json"))) < shards
    require_valid(workspace)


def test_its_manifest_has_the_checks_of_all_shards(kept: Path) -> None:
    manifest = json.loads((kept / "run/dump/manifest.json").read_text())
    assert manifest["counts"]["ok"] == 2 * SHARDS
    assert manifest["facts"]["agreement"] > 0.9


def test_a_run_without_follow_is_refused(kept: Path) -> None:
    recipe = yaml.safe_load((kept / "recipe.yaml").read_text())
    recipe["train"] |= {"follow": False}
    other = kept / "other.yaml"
    other.write_text(yaml.safe_dump(recipe))
    words = ["--recipe", str(other), "--workspace", str(kept), "--overwrite"]
    done = subprocess.run(
        [sys.executable, "-m", "stages.train", *words],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "dump-has-window" in done.stderr
