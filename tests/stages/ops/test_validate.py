# SPDX-License-Identifier: Apache-2.0
"""validate on a whole run of real files: passes it, and names the cause of each planted corruption."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.paths import RunPaths
from stages.ops.look.validate.artifacts import ARTIFACTS, RunView
from stages.ops.look.validate.findings import FAIL, PASS
from stages.ops.look.validate.run import validate
from tests.runs import ROOT, make_bench, make_synth, run
from tests.stages.ops.planted import PLANTED, edit


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("finished")
    make_synth(workspace)
    for stage in ("dump", "train"):
        done = run(workspace, stage)
        assert done.returncode == 0, done.stderr
    make_bench(workspace)
    return workspace


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "workspace", symlinks=True)
    return tmp_path / "workspace" / "run"


def findings(folder: Path, verdict: str = FAIL) -> dict[tuple[str, str], str]:
    found = validate(RunView(RunPaths(folder.parent, folder.name)), list(ARTIFACTS))
    return {
        (row.artifact, row.question): row.detail for row in found.rows if row.verdict == verdict
    }


def test_a_whole_run_passes(finished: Path) -> None:
    assert findings(finished / "run") == {}
    passed = findings(finished / "run", PASS)
    asked = {question for _, question, _ in PLANTED.values()}
    assert asked <= passed.keys()  # nothing that is planted below is out of reach here


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_corruption_is_named(folder: Path, planted: str) -> None:
    plant, question, cause = PLANTED[planted]
    plant(folder)
    failed = findings(folder)
    assert question in failed, failed
    assert re.search(cause, failed[question]), failed[question]
    assert not Path("/tmp/eyrie-must-not-appear").exists()


def ops(workspace: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.ops", *words, "--workspace", str(workspace)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_check_that_was_not_asked_is_not_said_to_have_passed(folder: Path) -> None:
    """Sampled answers have no agreement, and files tell no probabilities."""
    edit(
        folder / "dump" / "manifest.json",
        lambda m: m["facts"].update(agreement=None, logprob_gap=None),
    )
    told = findings(folder, "PASS")["dump", "capture"]
    assert told == "agreement not checked, log-probability gap in nats not checked"


def test_the_command_tells_by_its_exit_code(folder: Path) -> None:
    workspace = folder.parent
    out = workspace / "findings.md"
    whole = ops(workspace, "validate", "run", "--out", str(out), "--json")
    assert whole.returncode == 0, whole.stderr
    assert json.loads(whole.stdout)["verdict"] == "PASS"
    (folder / "train" / "d2t.npy").unlink()
    broken = ops(workspace, "validate", "run", "--out", str(out))
    assert broken.returncode == 3
    assert "FAIL: " in broken.stdout
    assert "| train | files | FAIL |" in out.read_text()
    assert ops(workspace, "validate", "run", "--only", "synth").returncode == 0
    missing = ops(workspace, "validate", "rum")
    assert missing.returncode == 2
    assert "Did you mean run?" in missing.stderr
