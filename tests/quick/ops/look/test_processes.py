# SPDX-License-Identifier: Apache-2.0
"""How a stage's processes are told from their real status files: at work, ended, killed, or history."""

import datetime
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from shared.artifacts import process_state
from shared.artifacts.artifact import Artifact
from shared.artifacts.run_state import RunState
from shared.errors import RetryableError
from shared.paths import RunPaths
from shared.runtime.status import Status
from shared.settings import build
from stages.ops.look.status import read_states
from stages.synth.config import SynthConfig
from tests.quick.ops.look.statuses import state_of, wait_for, write, write_manifest


def test_a_working_stage_runs_and_a_killed_one_died(
    worker: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    running = state_of(tmp_path, "synth")
    assert (running.state, running.done, running.total) == ("running", 30, 120)
    assert running.facts == {"answer_tokens_per_s": 700}
    assert running.left_s is not None
    worker.send_signal(signal.SIGKILL)
    # Not reaped: a zombie works no more than a process that is gone.
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    died = state_of(tmp_path, "synth")
    assert died.state == "died"
    assert f"its process {worker.pid} is gone" in died.message
    worker.wait()
    assert state_of(tmp_path, "synth").state == "died"


def test_a_process_that_lives_keeps_its_file_young(
    worker: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    path = RunPaths(tmp_path, "r").status("synth")
    os.utime(path, (1, 1))
    wait_for(lambda: path.stat().st_mtime > 1)
    assert time.time() - path.stat().st_mtime < 60
    assert worker.poll() is None


def test_a_silent_process_of_another_host_died(tmp_path: Path) -> None:
    path = write(tmp_path, "dump")
    assert state_of(tmp_path, "dump").state == "running"
    minutes_ago = time.time() - 120
    os.utime(path, (minutes_ago, minutes_ago))
    died = state_of(tmp_path, "dump")
    assert died.state == "died"
    assert re.match(r"silent for 1[2-9]\d s: its process on elsewhere", died.message)


def test_a_stage_that_ends_well_while_it_is_looked_at_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file still said "running" when it was read, and its process was gone a moment later."""
    write(tmp_path, "synth", host=socket.gethostname())

    def gone(pid: int) -> bool:
        write(tmp_path, "synth", state="done", host=socket.gethostname(), exit_code=0)
        return False

    monkeypatch.setattr(process_state, "is_alive", gone)
    assert state_of(tmp_path, "synth").state == "done"


def test_an_artifact_that_is_voided_while_it_is_looked_at_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `--overwrite` does: the manifest goes first."""
    manifest = write_manifest(tmp_path, "synth")
    write(tmp_path, "synth", state="failed", exit_code=3, updated_s=1)
    stat = Path.stat

    def removed_since(path: Path, **how: Any) -> Any:
        found = stat(path, **how)
        if path == manifest:
            path.unlink()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", removed_since)
        assert state_of(tmp_path, "synth").state == "failed"
    assert not manifest.exists()
    assert state_of(tmp_path, "synth").state == "failed"


def test_a_stage_that_is_tried_again_runs_and_keeps_its_progress(tmp_path: Path) -> None:
    """What the process's start and end write, around what the stage itself writes."""
    path = write(tmp_path, "synth", state="failed", message="no room", exit_code=2)
    whole, stage = Status(path), Status(path, period_s=0.0)
    whole.opened()
    again = state_of(tmp_path, "synth")
    assert (again.state, again.message) == ("running", "")
    time.sleep(0.01)
    stage.progress(3, 4, "rows")
    whole.failed(RetryableError("the engine died", code="x"))
    ended = state_of(tmp_path, "synth")
    assert (ended.state, ended.done, ended.message) == ("failed", 3, "the engine died")
    Status(path).opened()
    assert state_of(tmp_path, "synth").done == 3


def test_who_is_sent_away_leaves_the_others_status(worker: Any, tmp_path: Path) -> None:
    """A second process on the same folder is refused with 75; the first one works on."""
    told = Status(RunPaths(tmp_path, "r").status("synth"))
    told.opened()
    assert state_of(tmp_path, "synth").state == "running"
    told.failed(RetryableError("another process holds the folder", code="x"))
    record = json.loads(told.path.read_text())
    assert (record["state"], record["pid"]) == ("running", worker.pid)
    worker.kill()
    worker.wait()
    told.failed(RetryableError("the server died", code="x"))
    assert json.loads(told.path.read_text())["state"] == "failed"


@pytest.mark.parametrize(("earlier", "now"), [("synth-3", "synth-0"), ("synth-0", "synth")])
def test_a_failed_share_of_an_older_count_is_history(
    tmp_path: Path, earlier: str, now: str
) -> None:
    """Four processes shared the stage, one of them failed; then two do, or one alone."""
    old, counts = time.time() - 500, {"synth-3": 4, "synth-0": 2, "synth": 1}
    write(tmp_path, earlier, state="failed", updated_s=old, num_shards=4)
    write(tmp_path, now, num_shards=counts[now])
    states = {state.name: state.state for state in read_states(RunPaths(tmp_path, "r"))}
    assert states[now] == "running"
    assert earlier not in states
    write(tmp_path, now, state="done", num_shards=4)  # of the same count it counts
    states = {state.name: state.state for state in read_states(RunPaths(tmp_path, "r"))}
    assert states[earlier] == "failed"


def test_a_share_that_failed_before_its_stage_was_finished_is_history(tmp_path: Path) -> None:
    write(tmp_path, "synth", state="done")
    write(tmp_path, "synth-1", state="failed", num_shards=4, updated_s=1)
    write_manifest(tmp_path, "synth")
    names = [state.name for state in read_states(RunPaths(tmp_path, "r"))]
    assert names == ["synth", "dump", "train", "bench"]


def finish(workspace: Path, stage: str, finished_s: float) -> None:
    """A finished artifact without a file, and its config nowhere: as far as status reads it."""
    flags = {"workspace": str(workspace), "name": "r", "target": "t", "prompts": "p.jsonl"}
    config = build(SynthConfig, flags)
    artifact = Artifact(RunPaths(workspace, "r").stage(stage), config)
    with artifact.work():
        artifact.finish([], counts={"in": 1, "ok": 1, "skipped": {}, "failed": {}})
    path = artifact.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    ended = datetime.datetime.fromtimestamp(finished_s, datetime.UTC)
    manifest["provenance"]["finished"] = ended.isoformat(timespec="seconds")
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("code", ["artifact-settings", "parent-settings", "disk-full"])
def test_a_refusal_of_other_settings_leaves_a_finished_stage_done(
    tmp_path: Path, code: str
) -> None:
    """Started 5,000 s ago, finished 40 s later; a command of today was refused."""
    began = round(time.time()) - 5000
    finish(tmp_path, "synth", began + 40)
    error = {"code": code, "problem": "synth.temperature: was 0.0"}
    told = {"state": "failed", "exit_code": 2, "message": "synth.temperature: was 0.0"}
    write(tmp_path, "synth", **told, error=error, started_s=began)
    found = state_of(tmp_path, "synth")
    if code == "disk-full":
        assert found.state == "failed"
        return
    assert (found.state, found.seconds) == ("done", 40)
    assert found.message == "other settings were refused since: synth.temperature: was 0.0"
    # What was refused is what triage explains.
    assert RunState(RunPaths(tmp_path, "r")).stages["synth"].state == "failed"


def test_a_refusal_beside_a_manifest_that_is_damaged_is_shown(tmp_path: Path) -> None:
    write_manifest(tmp_path, "synth")
    error = {"code": "artifact-settings", "problem": "other settings"}
    write(tmp_path, "synth", state="failed", message="other settings", error=error)
    assert state_of(tmp_path, "synth").state == "failed"


def test_a_refusal_without_a_finished_artifact_is_a_failure(tmp_path: Path) -> None:
    error = {"code": "artifact-settings", "problem": "other settings"}
    write(tmp_path, "synth", state="failed", exit_code=2, error=error)
    assert state_of(tmp_path, "synth").state == "failed"


def test_the_time_that_a_stage_took_is_the_same_in_a_copy_of_its_run(tmp_path: Path) -> None:
    """A copy's files are young, and its stage, run again, finds its work done."""
    began = round(time.time()) - 5000
    finish(tmp_path, "synth", began + 40)
    write(tmp_path, "synth", state="done", started_s=began)
    assert state_of(tmp_path, "synth").seconds == 40
    write(tmp_path, "synth-1", state="failed", started_s=began, updated_s=began + 20, num_shards=1)
    assert [state.name for state in read_states(RunPaths(tmp_path, "r"))][:2] == ["synth", "dump"]
