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
from stages.ops.config import ReviewConfig, TriageConfig
from stages.ops.look.triage import last_attempt
from stages.ops.look.triage.case import open_case
from stages.ops.look.triage.last_attempt import read_last_attempt
from stages.ops.look.triage.own_errors import WRAPPERS
from stages.ops.look.triage.run import run, run_review
from stages.ops.look.triage.text import safe
from tests.triage_cases import END_OF_HEADER

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run_folder = tmp_path / "run"
    (run_folder / "logs").mkdir(parents=True)
    (run_folder / "status").mkdir()
    return run_folder


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
    status(folder, "synth-3", state="failed", exit_code=3, message="no room")
    finished_s = manifest.stat().st_mtime
    os.utime(folder / "status" / "synth-3.json", (0, finished_s + newer_s))
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


def test_what_a_log_holds_moves_no_cursor_and_tells_no_secret(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "OddError: \x1b]0;own\x07 \u202e HF_TOKEN=hf_abcdefghijklmnop123 Bearer ab.cd api_key: k3y-aaaa9\n"
    log(folder, "train", BEGIN, evil)
    run(TriageConfig(folder=folder))
    out = capsys.readouterr().out
    assert "OddError" in out
    assert not any(character in out for character in "\x1b\x07\u202e")
    assert not any(secret in out for secret in ("abcdefghijklmnop", "ab.cd", "k3y-aaaa9"))
    assert safe("tokens=20594/133526 token 7: max_tokens: 224") == (
        "tokens=20594/133526 token 7: max_tokens: 224"
    )


def test_lines_that_never_end_and_bytes_that_are_no_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = b"OSError: [Errno 28] No space left on device\n"
    odd = b"\xff\xfe\x00" * 100 + b"\n" + b"x" * 40_000_000 + b"\n" + full
    (folder / "logs" / "dump.log").write_bytes(odd)
    (first,) = triage(folder, capsys)[1]["diagnoses"]
    assert (first["rule"], first["evidence"]["line"]) == ("disk-full", 3)


@pytest.mark.parametrize("ended", [True, False])
def test_of_a_long_log_the_last_attempts_begin_and_end_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    monkeypatch.setattr(last_attempt, "HEAD_BYTES", 200)
    monkeypatch.setattr(last_attempt, "TAIL_BYTES", 400)
    monkeypatch.setattr(last_attempt, "_CHUNK_BYTES", 64)
    earlier = [BEGIN.replace("{stage}", "dump"), "old\n"]
    lines = [BEGIN.replace("{stage}", "dump"), *(f"line {number}\n" for number in range(4, 500))]
    path = tmp_path / "log"
    path.write_text("".join([*earlier, *lines]) + ("the end\n" if ended else "the end"))
    kept = read_last_attempt(path)
    assert (kept.stage, kept.count, kept.num_lines) == ("dump", 2, 500)
    assert kept.lines[0][0] == 3 and "begin: process" in kept.lines[0][1]
    assert kept.lines[-1] == (500, "the end")
    numbered = [(number, text) for number, text in kept.lines if text.startswith("line ")]
    assert 20 < len(numbered) < 100
    assert all(text == f"line {number}" for number, text in numbered)


def test_a_saved_fixture_is_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(folder, "dump", BEGIN, f"OddError: {folder.parent}/x is odd HF_TOKEN=hf_abcdefghijkl1\n")
    path = folder.parent / "new.log"
    assert run(TriageConfig(folder=folder, save_fixture=path)) == 3
    header, _, kept = path.read_text().partition(END_OF_HEADER)
    assert yaml.safe_load(header)["expect"] == "unknown"
    assert yaml.safe_load(header)["stage"] == "dump"
    assert "OddError: /workspace/x is odd" in kept
    assert "hf_abc" not in kept
    capsys.readouterr()


def test_review_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(folder, "synth", BEGIN, DONE)
    status(folder, "synth", state="done", exit_code=0, message="", started_s=0, updated_s=61)
    log(folder, "dump", BEGIN, SHM, LAST)
    assert run_review(ReviewConfig(folder=folder)) == 3
    page = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert "| PASS | 61 s |" in rows["synth"]
    assert "| FAIL |" in rows["dump"] and "64 MiB free" in rows["dump"]
    assert "| NOT RUN |" in rows["train"]
    assert "**FAIL**: dump." in page
    assert "--only dump,train,bench" in page


def test_review_of_a_launchers_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {
        0: "Server ready\nsrun: error: node1: task 0: Exited with exit code 143\n",
        1: "0: pyxis: child 77 terminated with signal 15\n",
        2: "FileNotFoundError: [Errno 2] No such file or directory: '/scratchspace/offline_hidden_states'\n",
    }
    for task, text in lines.items():
        (tmp_path / f"task_{task}").mkdir()
        (tmp_path / f"task_{task}" / f"sbatch_4{task}.out").write_text(text)
    out = tmp_path / "page.md"
    assert run_review(ReviewConfig(folder=tmp_path, out=out)) == 3
    page = out.read_text()
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert "| PASS |" in rows["synth"]
    assert "| FAIL |" in rows["dump"] and "| FAIL |" in rows["train"]
    assert "| NOT RUN |" in rows["bench"]
    assert "pipeline.task_0.skip=true --yes" in page
    assert capsys.readouterr().out == ""
