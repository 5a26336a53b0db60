# SPDX-License-Identifier: Apache-2.0
"""status and watch on real status files, of processes that work, end and are killed."""

import datetime
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.artifacts import process_state
from shared.artifacts.artifact import Artifact
from shared.artifacts.process_state import ProcessState
from shared.artifacts.run_state import RunState, find_run
from shared.artifacts.unfinished import IDENTITY
from shared.errors import RetryableError, UserError
from shared.io import files
from shared.paths import RunPaths
from shared.runtime.status import Status
from shared.settings import build
from stages.ops.config import StatusConfig, ValidateConfig, WatchConfig
from stages.ops.look.status import _looks, read_states, run, sparkline, watch
from stages.ops.look.validate.run import run as validate
from stages.synth.config import SynthConfig

ROOT = Path(__file__).resolve().parents[4]
# A stage as far as its status goes: it says how far it is, and then nothing for a long time.
WORKER = """
import sys, time
from pathlib import Path
from shared.runtime import status
status.BEAT_S = 0.05
told = status.Status(Path(sys.argv[1]), period_s=0.0)
told.started()
for done in (10, 20, 30):
    time.sleep(0.02)
    told.progress(done, 120, "rows", answer_tokens_per_s=700)
print("working", flush=True)
time.sleep(600)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Any:
    command = [sys.executable, "-c", WORKER, str(RunPaths(tmp_path, "r").status("synth"))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def state_of(workspace: Path, stage: str) -> ProcessState:
    (found,) = [state for state in read_states(RunPaths(workspace, "r")) if state.name == stage]
    return found


def write(workspace: Path, stage: str, **record: Any) -> Path:
    path = RunPaths(workspace, "r").status(stage)
    now = time.time()
    known = {"state": "running", "pid": 1, "host": "elsewhere", "started_s": now, "updated_s": now}
    # Whole, as a stage writes it: a watch may be reading. Python's own JSON, since some are damaged.
    files.write_text(path, json.dumps({**known, **record}))
    return path


def write_manifest(workspace: Path, stage: str) -> Path:
    path = RunPaths(workspace, "r").stage(stage) / "manifest.json"
    files.write_text(path, "{}")
    return path


def wait_for(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


def test_states_of_a_whole_run(tmp_path: Path) -> None:
    write(tmp_path, "synth", state="done", updated_s=time.time() + 60)
    write(tmp_path, "dump-0", progress={"done": 1, "total": 4, "unit": "tokens", "left_s": 9})
    write(tmp_path, "dump-1", state="failed", message="no room")
    RunPaths(tmp_path, "r").status("train").write_text("{")
    states = read_states(RunPaths(tmp_path, "r"))
    assert [(state.name, state.state) for state in states] == [
        ("synth", "done"),
        ("dump-0", "running"),
        ("dump-1", "failed"),
        ("train", "unreadable"),
        ("bench", "to do"),
    ]
    left_s = states[1].left_s
    assert left_s is not None
    assert max(0.0, 9 - (time.time() - states[1].record["updated_s"])) <= left_s <= 9


@pytest.mark.parametrize(
    ("begun", "identity", "states"),
    [
        ("dump", {"dump.conversations": "c.jsonl"}, ["skipped", "done", "to do", "to do"]),
        ("dump", {"parent.synth": "0" * 64}, ["to do", "done", "to do", "to do"]),
        ("bench", {"bench.head": "a/b"}, ["skipped", "skipped", "skipped", "done"]),
        ("train", None, ["to do", "to do", "done", "to do"]),
    ],
)
def test_stages_that_what_came_after_needs_not(
    tmp_path: Path, begun: str, identity: dict[str, str] | None, states: list[str]
) -> None:
    write(tmp_path, begun, state="done")
    folder = RunPaths(tmp_path, "r").stage(begun)
    folder.mkdir()
    if identity is not None:
        (folder / IDENTITY).write_text(json.dumps(identity))
    assert [each.state for each in read_states(RunPaths(tmp_path, "r"))] == states


def test_a_watch_ends_without_the_stages_that_nothing_needs(tmp_path: Path) -> None:
    folder = RunPaths(tmp_path, "r").stage("dump")
    for stage in ("dump", "train", "bench"):
        write(tmp_path, stage, state="done")
    looks = _looks(RunPaths(tmp_path, "r"), 0.01)
    assert next(looks)[0].state == "to do"
    assert next(looks)  # as far as anybody knows, synth is still to come
    folder.mkdir()
    (folder / IDENTITY).write_text(json.dumps({"dump.conversations": "c.jsonl"}))
    assert next(looks)[0].state == "skipped"
    with pytest.raises(StopIteration):
        next(looks)


def test_a_watch_goes_on_while_another_process_works(tmp_path: Path) -> None:
    write(tmp_path, "synth-0")
    write(tmp_path, "synth-1", state="failed")
    looks = _looks(RunPaths(tmp_path, "r"), 0.01)
    assert next(looks)
    assert next(looks)
    write(tmp_path, "synth-0", state="stopped")
    assert next(looks)[0].state == "stopped"
    with pytest.raises(StopIteration):
        next(looks)


def test_what_is_shown_and_when_a_watch_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "synth", progress={"done": 1, "total": 4, "unit": "rows", "loss": "0.5"})
    flags = {"name": "r", "workspace": str(tmp_path)}
    run(build(StatusConfig, flags))
    shown = capsys.readouterr().out
    assert "1 / 4 rows (25%)" in shown
    assert "loss 0.5" in shown
    run(build(StatusConfig, {**flags, "json": "True"}))
    assert [row["state"] for row in json.loads(capsys.readouterr().out)["stages"]] == [
        "running",
        *["to do"] * 3,
    ]
    command = [sys.executable, "-m", "stages.ops", "watch", "r", "--json", "--period_s", "0.05"]
    watcher = subprocess.Popen(
        [*command, "--workspace", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert watcher.stdout is not None
    assert json.loads(watcher.stdout.readline())["stages"][0]["state"] == "running"
    write(tmp_path, "synth", state="failed", message="no room", exit_code=2)
    told = watcher.communicate(timeout=60)[0].splitlines()
    assert json.loads(told[-1])["stages"][0]["message"] == "no room"
    assert watcher.returncode == 0
    for stage in ("synth", "dump", "train", "bench"):
        write(tmp_path, stage, state="done")
    watch(build(WatchConfig, flags))  # nothing can change any more: it returns at once


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


def test_a_run_without_a_recipe_is_found(tmp_path: Path) -> None:
    write(tmp_path, "dump", state="done")
    with pytest.raises(UserError, match="Did you mean r"):
        find_run("rr", tmp_path)
    assert find_run("r", tmp_path).root == tmp_path / "r"


@pytest.mark.parametrize("name", ["", "other", "x" * 300, "a\0b"])
def test_a_folder_without_a_run_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "other" / "logs").mkdir(parents=True)
    for command, config in ((run, StatusConfig), (watch, WatchConfig), (validate, ValidateConfig)):
        with pytest.raises(UserError) as refused:
            command(build(config, {"name": name, "workspace": str(tmp_path)}))
        assert refused.value.code == "run-missing"


@pytest.mark.parametrize("mark", ["recipe.yaml", "status/synth.json", "export/manifest.json"])
def test_a_run_is_known_by_what_stages_write(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "r" / mark
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert find_run("r", tmp_path).root == tmp_path / "r"


@pytest.mark.parametrize(
    ("record", "state"),
    [
        ({"state": "paused"}, "unreadable"),
        ({"started_s": 1e300}, "unreadable"),
        ({"updated_s": float("nan"), "state": "done"}, "unreadable"),
        ({"host": socket.gethostname(), "pid": 1 << 80}, "died"),
        ({"progress": {"done": 10**400, "total": 3}}, "unreadable"),
        ({"progress": {"done": 1, "total": 3, "left_s": 1e300}}, "running"),
        ({"progress": {"done": 1, "total": 3, "left_s": float("inf")}}, "unreadable"),
    ],
)
def test_a_status_that_no_stage_writes_is_shown(
    tmp_path: Path, record: dict[str, Any], state: str
) -> None:
    """By status, and by what takes the worst of a stage's processes."""
    write(tmp_path, "synth", **record)
    assert state_of(tmp_path, "synth").state == state
    assert RunState(RunPaths(tmp_path, "r")).stages["synth"].state == state
    run(build(StatusConfig, {"name": "r", "workspace": str(tmp_path)}))


def test_a_loss_that_is_no_number_is_not_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("synth", "dump", "train", "bench"):
        write(tmp_path, stage, state="done")
    history = RunPaths(tmp_path, "r").stage("train") / "history.jsonl"
    history.parent.mkdir(parents=True)
    losses = ("7", "NaN", "Infinity", "-Infinity", "1e308", "3")
    rows = [f'{{"step": {step}, "loss": {loss}}}' for step, loss in enumerate(losses, 1)]
    history.write_text("\n".join([*rows, f'{{"step": 1{"0" * 400}, "loss": 1}}']) + "\n")
    watch(build(WatchConfig, {"name": "r", "workspace": str(tmp_path)}))
    assert "loss █▁  7.00 to 3.00, step 1 to 6" in capsys.readouterr().out


def test_a_watch_draws_loss_and_walks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("synth", "dump", "train", "bench"):
        write(tmp_path, stage, state="done")
    history = RunPaths(tmp_path, "r").stage("train") / "history.jsonl"
    history.parent.mkdir(parents=True)
    rows = [{"step": step, "loss": 8 - step} for step in range(1, 6)]
    rows += [{"step": 2, "walked_acceptance_length": 1.25}]
    history.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "lo')
    flags = {"name": "r", "workspace": str(tmp_path)}
    watch(build(WatchConfig, flags))
    shown = capsys.readouterr().out
    assert "loss █▆▅▃▁  7.00 to 3.00, step 1 to 5" in shown
    assert "walked AL" not in shown  # one walk is no curve
    with history.open("a") as more:
        more.write('\n{"step": 5, "walked_acceptance_length": 1.5}\n')
    watch(build(WatchConfig, flags))
    assert "walked AL ▁█  1.25 to 1.50, step 2 to 5" in capsys.readouterr().out


def test_a_long_curve_is_averaged_into_forty_bars() -> None:
    assert sparkline([0.0] * 60 + [7.0] * 60) == "▁" * 20 + "█" * 20
    assert sparkline([1.0, 2.0, 3.0, 8.0]) == "▁▂▃█"
    assert sparkline([2.0, 2.0]) == "▁▁"


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


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_reader_that_leaves_is_no_bug(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """As in `ops status | head`."""
    write(tmp_path, "synth", state="done")
    source, sink = os.pipe()
    os.close(source)
    command = [sys.executable, "-m", "stages.ops", "status", "r", "--workspace", str(tmp_path)]
    environment = {"PYTHONPATH": str(ROOT)}  # output is buffered
    with os.fdopen(sink, "wb") as unread:
        done = subprocess.run(
            [*command, *flags], env=environment, stdout=unread, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 143, done.stderr
    assert [line.partition("Z ")[2] for line in done.stderr.splitlines()] == [
        "INFO ops [output-unread] nobody reads the output any more"
    ]
