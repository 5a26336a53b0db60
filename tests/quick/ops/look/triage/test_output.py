# SPDX-License-Identifier: Apache-2.0
"""What triage and review print of logs that strangers wrote, and what they keep of them."""

from pathlib import Path

import pytest
import yaml

from shared.artifacts.unfinished import IDENTITY
from shared.paths import STAGES
from stages.ops.config import ReviewConfig, TriageConfig
from stages.ops.look.triage import last_attempt
from stages.ops.look.triage.last_attempt import read_last_attempt
from stages.ops.look.triage.run import run, run_review
from stages.ops.look.triage.text import safe
from tests.quick.ops.look.triage.test_command import BEGIN, DONE, LAST, SHM, log, status, triage
from tests.triage.cases import END_OF_HEADER


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


def test_review_of_a_run_that_needed_no_synth(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "dump").mkdir()
    (folder / "dump" / IDENTITY).write_text('{"dump.conversations": "chats.jsonl"}')
    for stage in ("dump", "train"):
        log(folder, stage, BEGIN, DONE)
        status(folder, stage, state="done", exit_code=0, message="", started_s=0, updated_s=61)
    run_review(ReviewConfig(folder=folder))
    page = capsys.readouterr().out
    assert "| synth | SKIPPED | " in page
    assert "**NOT FINISHED**: bench." in page
    assert "--only bench" in page
    log(folder, "bench", BEGIN, DONE)
    status(folder, "bench", state="done", exit_code=0, message="", started_s=0, updated_s=61)
    assert run_review(ReviewConfig(folder=folder)) == 0
    page = capsys.readouterr().out
    assert "**PASS**: all stages that it needs." in page
    assert "Nothing: the head is in export/." in page


def test_another_command_s_failure_is_not_that_of_its_stage(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in STAGES:
        log(folder, stage, BEGIN, DONE)
        status(folder, stage, state="done", exit_code=0, message="", started_s=0, updated_s=61)
    failed = "[curve-without-walks] /w/curve: expected walks, found none."
    (folder / "logs" / "curve.log").write_text(f"2026-11-20T03:12:00Z ERROR train {failed}\n")
    assert run_review(ReviewConfig(folder=folder)) == 3
    page = capsys.readouterr().out
    assert "| train | PASS | 61 s | train.log (2 lines) |" in page
    assert "**FAIL**: curve.log, a log of no known stage." in page
    assert "## curve.log, a log of no known stage: /w/curve: expected walks" in page
    assert "python -m stages.train curve" in page and "--only" not in page
    run(TriageConfig(folder=folder))
    assert capsys.readouterr().out.startswith("1. curve.log, a log of no known stage: /w/curve: ")


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
