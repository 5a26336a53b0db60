# SPDX-License-Identifier: Apache-2.0
"""triage and review as an operator types them: what they print, and their exit codes."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from shared.errors import UserError
from shared.runtime.log import format_error
from stages.ops.config import TriageConfig
from stages.ops.look.triage.case import open_case
from stages.ops.look.triage.own_errors import WRAPPERS
from stages.ops.look.triage.run import run

ROOT = Path(__file__).resolve().parents[5]
BEGIN = "2026-11-20T03:10:00Z INFO {stage} begin: process 17\n"
DONE = "2026-11-20T03:11:00Z INFO {stage} done: /w/run/{stage}/manifest.json\n"
SHM = "(E pid=3) RuntimeError: Insufficient space in /dev/shm for ring: 160 MiB required, 64 MiB free.\n"
DIED = "(A pid=2) RuntimeError: Engine core initialization failed. See root cause above.\n"
LAST = (
    "2026-11-20T03:12:00Z ERROR {stage} [engine-start-refused] the server ended with code 1.\n"
    "    remedy: Read its log above.\n"
    '    facts: {"exit_code": 1}\n'
)


def log(folder: Path, stage: str, *lines: str) -> None:
    (folder / "logs" / f"{stage}.log").write_text("".join(lines).replace("{stage}", stage))


def status(folder: Path, stage: str, **record: object) -> None:
    known = {"pid": 1, "host": "elsewhere", "started_s": 0, "updated_s": time.time()}
    (folder / "status" / f"{stage}.json").write_text(json.dumps({**known, **record}))


def triage(folder: Path, capsys: pytest.CaptureFixture[str], **more: object) -> tuple[int, dict]:
    code = run(TriageConfig(folder=folder, json=True, **more))
    return code, json.loads(capsys.readouterr().out)


def test_a_workers_first_error_goes_before_what_it_led_to(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder, "synth", BEGIN, SHM, DIED, LAST)
    code, found = triage(folder, capsys)
    assert code == 3
    rules = [diagnosis["rule"] for diagnosis in found["diagnoses"]]
    assert rules == ["shm-too-small", "engine-core-failed", "engine-start-refused"]
    assert "engine-start-refused" in WRAPPERS
    assert found["diagnoses"][0]["evidence"]["line"] == 2
    assert "64 MiB free" in found["diagnoses"][0]["cause"]


def test_an_earlier_attempt_does_not_count(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder, "synth", BEGIN, SHM, LAST, BEGIN, DONE)
    assert triage(folder, capsys)[0] == 0
    full = "OSError: [Errno 28] No space left on device\n"
    log(folder, "synth", BEGIN, SHM, LAST, BEGIN, full)
    assert triage(folder, capsys)[1]["diagnoses"][0]["rule"] == "disk-full"


def test_what_a_done_stage_went_through_is_no_failure(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder, "synth", BEGIN, SHM)
    assert triage(folder, capsys)[0] == 3
    status(folder, "synth", state="done", exit_code=0, message="")
    assert triage(folder, capsys)[0] == 0


def test_the_first_stage_that_failed_comes_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder, "synth", BEGIN, SHM)
    parent = "[parent-missing] expected the finished artifact of synth, found none."
    log(folder, "dump", BEGIN, f"2026-11-20T03:12:00Z ERROR dump {parent}\n")
    stages = [diagnosis["stage"] for diagnosis in triage(folder, capsys)[1]["diagnoses"]]
    assert stages == ["synth", "dump"]


def test_a_stages_last_words_go_before_earlier_trouble_it_got_over(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = "2026-11-20T03:12:00Z ERROR dump [states-not-finite] sample a: its states hold NaN.\n"
    log(folder, "dump", BEGIN, "OSError: [Errno 28] No space left on device\n", last)
    assert triage(folder, capsys)[1]["diagnoses"][0]["rule"] == "states-not-finite"


def test_an_unknown_failure_is_shown_and_not_guessed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = [
        "Traceback (most recent call last):\n",
        '  File "x.py", line 1\n',
        "OddError: never seen\n",
    ]
    log(folder, "train", BEGIN, *trace, DIED)
    code, found = triage(folder, capsys)
    first = found["diagnoses"][0]
    assert (code, first["rule"], first["evidence"]["line"]) == (3, "unknown", 4)
    assert first["evidence"]["text"] == "OddError: never seen"
    assert "OddError: never seen" in first["cause"]
    assert '  File "x.py", line 1' in first["evidence"]["context"]
    assert run(TriageConfig(folder=folder)) == 3
    assert "   | OddError: never seen" in capsys.readouterr().out


def test_an_error_that_a_rule_of_another_stage_has_is_unknown(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder, "synth", BEGIN, "KeyError: model.layers.0 of the decoder\n")
    code, found = triage(folder, capsys)
    assert (code, found["diagnoses"][0]["rule"]) == (3, "unknown")


def test_a_failure_without_a_word_in_the_log_is_unknown_too(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder, "train", BEGIN)
    status(folder, "train", state="failed", exit_code=1, message="the moon was wrong")
    code, found = triage(folder, capsys)
    assert (code, found["diagnoses"][0]["rule"]) == (3, "unknown")
    assert "the moon was wrong" in found["diagnoses"][0]["evidence"]["text"]


@pytest.mark.parametrize("has_log", [True, False])
@pytest.mark.parametrize("has_status", [True, False])
def test_an_error_of_ours_is_told_by_its_parts(
    folder: Path, capsys: pytest.CaptureFixture[str], has_log: bool, has_status: bool
) -> None:
    """From the status file, the log, or both; whatever its words are."""
    for words in (("expected 3 gulls, found 2.", "Feed them."), ("CUDA out of memory", "401 429")):
        error = UserError(words[0], code="gulls-missing", remedy=words[1], facts={"found": 2})
        record = f"2026-11-20T03:12:00Z ERROR train {format_error(error)}".replace("\n", "\n    ")
        log(folder, "train", BEGIN, f"{record}\n" if has_log else "")
        status(folder, "train", state="running")
        (folder / "status" / "train.json").unlink()
        if has_status:
            status(folder, "train", state="failed", exit_code=2, error=error.as_dict())
        code, found = triage(folder, capsys)
        first = found["diagnoses"][0] if has_log or has_status else None
        if first is None:
            assert code == 0
            continue
        assert (code, first["rule"], first["role"]) == (3, "gulls-missing", "own")
        assert (first["cause"], first["fix"], first["facts"]) == (*words, {"found": 2})
        expected = "logs/train.log" if has_log else "status/train.json"
        assert first["evidence"]["file"].endswith(expected)


def test_a_workspace_with_a_space_is_quoted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my disk" / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("run: {name: run, target: t}")
    log(folder, "synth", BEGIN, SHM)
    rerun = triage(folder, capsys)[1]["diagnoses"][0]["rerun"]
    words = shlex.split(rerun)
    assert words[words.index("--workspace") + 1] == str(tmp_path / "my disk")
    assert words[words.index("--recipe") + 1] == str(folder / "recipe.yaml")


def test_nothing_is_claimed_of_a_recipe_that_nobody_gave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "captured.log"
    path.write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n")
    assert run(TriageConfig(logs=(path,), json=True)) == 3
    (first,) = json.loads(capsys.readouterr().out)["diagnoses"]
    assert first["stage"] is None
    assert "now" not in first["fix"] and "RECIPE" not in first["rerun"]


@pytest.mark.parametrize(
    "end",
    [
        "the tool gave up: it cannot go on",
        "make: *** [Makefile:3: train] Error 2",
        "srun: error: node001: task 0: Exited with exit code 1",
        "/opt/run.sh: line 3: frobnicate: command not found",
        "QuirkError: the flux is inverted",
    ],
)
def test_no_end_that_looks_like_a_failure_is_nothing_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    path = tmp_path / "captured.log"
    path.write_text(f"starting\nloading\n{end}\n")
    assert run(TriageConfig(logs=(path,))) == 3
    assert end.split(":")[-1].strip() in capsys.readouterr().out


def test_an_error_that_a_server_got_over_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad request is logged with its traceback; the server answers the next ones."""
    path = tmp_path / "captured.log"
    words = "ValueError: This model's maximum context length is 99 tokens"
    bad = f"(APIServer pid=1) ERROR 01-01 10:00:00 [serving.py:1] {words}\n"
    good = '(APIServer pid=1) INFO:     127.0.0.1:5 - "POST /v1/completions HTTP/1.1" 200 OK\n'
    path.write_text(bad + good * 30)
    assert run(TriageConfig(logs=(path,))) == 0
    path.write_text(bad + good * 3)
    assert run(TriageConfig(logs=(path,))) == 3
    capsys.readouterr()


def test_a_process_that_is_gone_without_a_word(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    record = {"state": "running", "host": socket.gethostname(), "updated_s": 0}
    log(folder, "train", BEGIN)
    status(folder, "train", **record, pid=gone.pid)
    assert triage(folder, capsys)[1]["diagnoses"][0]["rule"] == "vanished"
    status(folder, "train", **record, pid=os.getpid())
    assert triage(folder, capsys)[0] == 0


def state_of(folder: Path, stage: str) -> str:
    case = open_case([folder], recipe=None, workspace=folder.parent, exit_codes={})
    return case.state(stage).state


@pytest.mark.parametrize(
    ("told_ago_s", "touched_ago_s", "state"),
    [
        (3600, 1, "running"),  # it beats, and has nothing to tell while an engine is measured
        (60, 120, "died"),
        (3 * 86400, 1, "died"),  # the run was copied here just now
    ],
)
def test_a_process_of_another_host_lives_while_it_touches_its_status(
    folder: Path, told_ago_s: float, touched_ago_s: float, state: str
) -> None:
    now_s = time.time()
    status(folder, "bench", state="running", host="elsewhere", pid=1, updated_s=now_s - told_ago_s)
    os.utime(folder / "status" / "bench.json", (0, now_s - touched_ago_s))
    assert state_of(folder, "bench") == state


@pytest.mark.parametrize(("newer_s", "state"), [(-60, "done"), (60, "failed")])
def test_a_share_that_failed_before_its_stage_was_done_is_history(
    folder: Path, newer_s: float, state: str
) -> None:
    """One of four shares failed; a single process then ran the stage again, to its end."""
    (folder / "synth").mkdir()
    manifest = folder / "synth" / "manifest.json"
    manifest.write_text("{}")
    status(folder, "synth", state="done", exit_code=0, message="")
    told_s = manifest.stat().st_mtime + newer_s
    status(folder, "synth-3", state="failed", exit_code=3, message="no room", updated_s=told_s)
    assert state_of(folder, "synth") == state


def test_the_fix_is_for_this_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"run": {"name": "run", "target": "t"}, "dump": {"batch_tokens": 4096}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    log(folder, "dump", BEGIN, "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n")
    first = triage(folder, capsys)[1]["diagnoses"][0]
    assert "--batch_tokens 2048" in first["fix"]
    expected = f"python -m stages.ops run --recipe {folder}/recipe.yaml --workspace {folder.parent}"
    assert first["rerun"] == f"{expected} --only dump,train,bench"


def test_an_exit_code_that_only_the_operator_knows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder, "dump", BEGIN)
    assert triage(folder, capsys)[0] == 0
    first = triage(folder, capsys, exit_codes={"dump": 137})[1]["diagnoses"][0]
    assert first["rule"] == "killed-exit-code"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["clean.log"], 0),
        (["failed.log"], 3),
        (["nowhere.log"], 2),
        ([], 2),
        (["--folder", "empty"], 2),
    ],
)
def test_exit_codes(tmp_path: Path, arguments: list[str], expected: int) -> None:
    (tmp_path / "clean.log").write_text("INFO all is well\n")
    (tmp_path / "failed.log").write_text("OSError: [Errno 28] No space left on device\n")
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "stages.ops", "triage", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "train.holdout_fraction: expected held-out samples, found 0. [curve-nothing-held-out]",
        "torch.OutOfMemoryError: CUDA out of memory.",
        "gulls",
    ],
)
def test_a_curve_is_asked_for_again_not_the_chain(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    (folder / "logs" / "curve.log").write_text(f"2026-11-20T03:12:00Z ERROR train {line}\n")
    first = triage(folder, capsys)[1]["diagnoses"][0]
    words = ["python", "-m", "stages.train", "curve", "--recipe", "RECIPE"]
    assert shlex.split(first["rerun"]) == [*words, "--workspace", str(folder.parent)]
