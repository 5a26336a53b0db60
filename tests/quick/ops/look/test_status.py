# SPDX-License-Identifier: Apache-2.0
"""status and watch of whole runs: what is shown, and when a watch ends."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shared.artifacts.run_state import RunState, find_run
from shared.artifacts.unfinished import IDENTITY
from shared.errors import UserError
from shared.paths import RunPaths
from shared.settings import build
from stages.ops.config import StatusConfig, ValidateConfig, WatchConfig
from stages.ops.look.status import _looks, read_states, run, sparkline, watch
from stages.ops.look.validate.run import run as validate
from tests.conftest import ROOT
from tests.quick.ops.look.statuses import state_of, write


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
