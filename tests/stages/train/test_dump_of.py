# SPDX-License-Identifier: Apache-2.0
"""A second run that trains on the first one's dump: other settings, nothing captured again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, make_synth, run


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose run `run` has a finished dump."""
    workspace = tmp_path_factory.mktemp("first")
    make_synth(workspace, num_rows=16)
    assert run(workspace, "dump").returncode == 0
    return workspace


@pytest.fixture
def workspace(first: Path, tmp_path: Path) -> Path:
    shutil.copytree(first, tmp_path / "workspace", symlinks=True)
    return tmp_path / "workspace"


def second(workspace: Path, stage: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    return run(workspace, stage, "--name", "second", *flags)


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_another_run_trains_on_it_and_is_found_sound(workspace: Path) -> None:
    before = stamps(workspace / "run" / "dump")
    flags = ("--dump_of", "run", "--epochs", "1", "--ttt_steps", "2")
    done = second(workspace, "train", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    manifests = [
        json.loads((workspace / name / "manifest.json").read_text())
        for name in ("run/dump", "second/train")
    ]
    assert manifests[1]["parents"]["dump"] == manifests[0]["fingerprint"]
    again = second(workspace, "train", *flags)
    assert again.returncode == 0 and "already done" in again.stderr
    checked = subprocess.run(
        [sys.executable, "-m", "stages.ops", "validate", str(workspace / "second")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "made from dump" in checked.stdout + checked.stderr, checked.stdout + checked.stderr
    assert stamps(workspace / "run" / "dump") == before
    # The same settings as the first run's: its own stages see that nothing is left to do.
    assert "already done" in second(workspace, "dump").stderr


@pytest.mark.parametrize("flags", [("--overwrite",), ("--shard_bytes", "9"), ()])
def test_a_borrowed_dump_is_never_changed(workspace: Path, flags: tuple[str, ...]) -> None:
    assert second(workspace, "train", "--dump_of", "run", "--epochs", "1").returncode == 0
    if not flags:  # what is missing from it is for its own run to mend
        min((workspace / "run" / "dump").glob("shard_*.pt")).unlink()
    before = stamps(workspace / "run" / "dump")
    refused = second(workspace, "dump", *flags)
    assert refused.returncode == 2, refused.stderr
    assert "run run" in refused.stderr or "shard_bytes: was" in refused.stderr
    assert stamps(workspace / "run" / "dump") == before


@pytest.mark.parametrize("name", ["nowhere", "second", "../workspace/run", "run/dump", ""])
def test_what_is_no_other_runs_dump_is_refused(workspace: Path, name: str) -> None:
    refused = second(workspace, "train", f"--dump_of={name}", "--epochs", "1")
    assert refused.returncode == 2, refused.stderr
    assert not (workspace / "second" / "dump").is_symlink()


def test_a_dump_made_with_other_settings_is_refused_with_the_keys(workspace: Path) -> None:
    refused = second(workspace, "train", "--dump_of", "run", "--max_length_tokens", "32")
    assert refused.returncode == 2
    assert "run.max_length_tokens: was 64, now 32" in refused.stderr


def test_a_dump_of_ones_own_is_not_hidden(workspace: Path) -> None:
    shutil.copytree(workspace / "run" / "dump", workspace / "second" / "dump")
    refused = second(workspace, "train", "--dump_of", "run")
    assert refused.returncode == 2
    assert "a folder of its own" in refused.stderr
    shutil.rmtree(workspace / "second")
    (workspace / "second").mkdir()
    (workspace / "second" / "dump").symlink_to("../third/dump")
    assert second(workspace, "train", "--dump_of", "run").returncode == 2


def test_a_link_to_a_larger_disk_is_ones_own(workspace: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk" / "dump"
    (workspace / "run" / "dump").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", disk)
    (workspace / "run" / "dump").symlink_to(disk)
    min(disk.glob("shard_*.pt")).unlink()
    assert run(workspace, "dump").returncode == 0, "made again there"
