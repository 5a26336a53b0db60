# SPDX-License-Identifier: Apache-2.0
"""triage and review as an operator types them: what they print, and their exit codes."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from stages.ops.config import ReviewConfig, TriageConfig
from stages.ops.look.triage import log_lines, log_scan
from stages.ops.look.triage.failure_rules import MIN_TEXT, fixed_texts, read_rules
from stages.ops.look.triage.log_files import open_case
from stages.ops.look.triage.log_scan import Scanner
from stages.ops.look.triage.run import run, run_review
from stages.ops.look.triage.text import safe
from tests.triage_cases import END_OF_HEADER

ROOT = Path(__file__).resolve().parents[5]
BEGIN = "2026-11-20T03:10:00Z INFO {stage} begin: process 17\n"
DONE = "2026-11-20T03:11:00Z INFO {stage} done: /w/run/{stage}/manifest.json\n"
SHM = "(E pid=3) RuntimeError: Insufficient space in /dev/shm for ring: 160 MiB required, 64 MiB free.\n"
DIED = "(A pid=2) RuntimeError: Engine core initialization failed. See root cause above.\n"
LAST = "2026-11-20T03:12:00Z ERROR {stage} the vLLM server ended with code 1 before it was ready.\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run_folder = tmp_path / "run"
    (run_folder / "logs").mkdir(parents=True)
    (run_folder / "status").mkdir()
    return run_folder


def log(folder: Path, stage: str, *lines: str) -> None:
    (folder / "logs" / f"{stage}.log").write_text("".join(lines).replace("{stage}", stage))


def status(folder: Path, stage: str, **record: object) -> None:
    (folder / "status" / f"{stage}.json").write_text(json.dumps(record))


def told(folder: Path, capsys: pytest.CaptureFixture[str], **more: object) -> tuple[int, dict]:
    code = run(TriageConfig(folder=folder, json=True, **more))
    return code, json.loads(capsys.readouterr().out)


def test_a_workers_first_error_goes_before_what_it_led_to(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder, "synth", BEGIN, SHM, DIED, LAST)
    code, found = told(folder, capsys)
    assert code == 3
    rules = [diagnosis["rule"] for diagnosis in found["diagnoses"]]
    assert rules == ["shm-too-small", "engine-core-failed", "server-ended"]
    assert found["diagnoses"][0]["evidence"]["line"] == 2
    assert "64 MiB free" in found["diagnoses"][0]["cause"]


def test_an_earlier_attempt_does_not_count(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder, "synth", BEGIN, SHM, LAST, BEGIN, DONE)
    assert told(folder, capsys)[0] == 0
    full = "OSError: [Errno 28] No space left on device\n"
    log(folder, "synth", BEGIN, SHM, LAST, BEGIN, full)
    assert told(folder, capsys)[1]["diagnoses"][0]["rule"] == "disk-full"


def test_what_a_done_stage_went_through_is_no_failure(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder, "synth", BEGIN, SHM)
    assert told(folder, capsys)[0] == 3
    status(folder, "synth", state="done", exit_code=0, message="")
    assert told(folder, capsys)[0] == 0


def test_the_first_stage_that_failed_comes_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder, "synth", BEGIN, SHM)
    parent = (
        "expected the finished artifact of stage synth in /w/run/synth, found no manifest.json."
    )
    log(folder, "dump", BEGIN, f"2026-11-20T03:12:00Z ERROR dump {parent}\n")
    stages = [diagnosis["stage"] for diagnosis in told(folder, capsys)[1]["diagnoses"]]
    assert stages == ["synth", "dump"]


def test_a_stages_last_words_go_before_earlier_trouble_it_got_over(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = "2026-11-20T03:12:00Z ERROR dump sample a: its states hold NaN or infinity.\n"
    log(folder, "dump", BEGIN, "OSError: [Errno 28] No space left on device\n", last)
    assert told(folder, capsys)[1]["diagnoses"][0]["rule"] == "states-not-finite"


def test_an_unknown_failure_is_shown_and_not_guessed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = [
        "Traceback (most recent call last):\n",
        '  File "x.py", line 1\n',
        "OddError: never seen\n",
    ]
    log(folder, "train", BEGIN, *trace, DIED)
    code, found = told(folder, capsys)
    first = found["diagnoses"][0]
    assert (code, first["rule"], first["evidence"]["line"]) == (3, "unknown", 2)
    assert "OddError: never seen" in first["evidence"]["context"]
    assert run(TriageConfig(folder=folder)) == 3
    assert "   | OddError: never seen" in capsys.readouterr().out


def test_an_error_that_a_rule_of_another_stage_has_is_unknown(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder, "synth", BEGIN, "RuntimeError: circuit breaker open\n")
    code, found = told(folder, capsys)
    assert (code, found["diagnoses"][0]["rule"]) == (3, "unknown")


def test_a_failure_without_a_word_in_the_log_is_unknown_too(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder, "train", BEGIN)
    status(folder, "train", state="failed", exit_code=1, message="the moon was wrong")
    code, found = told(folder, capsys)
    assert (code, found["diagnoses"][0]["rule"]) == (3, "unknown")
    assert "the moon was wrong" in found["diagnoses"][0]["evidence"]["text"]


def test_a_status_message_is_read_where_the_log_is_gone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told_by = "run.draft_vocab_size: expected at most the target's 512 tokens, found 32000."
    status(folder, "train", state="failed", exit_code=2, message=told_by)
    first = told(folder, capsys)[1]["diagnoses"][0]
    assert first["rule"] == "draft-vocabulary-too-large"
    assert first["evidence"]["file"].endswith("status/train.json")


def test_a_process_that_is_gone_without_a_word(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    record = {"state": "running", "host": socket.gethostname(), "updated_s": 0}
    log(folder, "train", BEGIN)
    status(folder, "train", **record, pid=gone.pid)
    assert told(folder, capsys)[1]["diagnoses"][0]["rule"] == "vanished"
    status(folder, "train", **record, pid=os.getpid())
    assert told(folder, capsys)[0] == 0


def state_of(folder: Path, stage: str) -> str:
    case = open_case([folder], recipe=None, workspace=folder.parent, exit_codes={})
    return case.stages[stage].state


@pytest.mark.parametrize(
    ("told_ago_s", "touched_ago_s", "state"),
    [
        (3600, 1, "running"),  # it beats, and has nothing to tell while an engine is measured
        (60, 120, "vanished"),
        (3 * 86400, 1, "vanished"),  # the run was copied here just now
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
    first = told(folder, capsys)[1]["diagnoses"][0]
    assert "--batch_tokens 2048" in first["fix"]
    expected = f"python -m stages.ops run --recipe {folder}/recipe.yaml --workspace {folder.parent}"
    assert first["rerun"] == f"{expected} --only dump,train,bench"


def test_an_exit_code_that_only_the_operator_knows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(folder, "dump", BEGIN)
    assert told(folder, capsys)[0] == 0
    first = told(folder, capsys, exit_codes={"dump": 137})[1]["diagnoses"][0]
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


def test_lines_that_never_end_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "odd.log"
    full = b"OSError: [Errno 28] No space left on device\n"
    path.write_bytes(b"\xff\xfe\x00" * 100 + b"\n" + b"x" * 40_000_000 + b"\n" + full)
    found = Scanner(read_rules()).scan(path)
    assert [hit.rule.id for hit in found.hits] == ["disk-full"]
    with path.open("rb") as log_file:
        log_file.seek(found.hits[0].line.offset)
        assert log_file.read(7) == b"OSError"


@pytest.mark.parametrize(("few_lines", "chunk_bytes"), [(1000, 1 << 20), (0, 1 << 20), (0, 20)])
def test_parts_of_a_rule_must_come_in_order_and_near_each_other(
    few_lines: int, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where lines are searched for texts, a part is in the next block, and errors abound."""
    monkeypatch.setattr(log_scan, "FEW_LINES", few_lines)
    monkeypatch.setattr(log_lines, "CHUNK_BYTES", chunk_bytes)
    rules = [rule for rule in read_rules() if rule.id == "attention-memory-long-rows"]
    first, second = "scaled_dot_product_attention(\n", "OutOfMemoryError: x\n"
    words = (chr(97 + n // 26) + chr(97 + n % 26) for n in range(log_scan.COUNTED_HITS + 1))
    errors = [f"ValueError: {word}\n" for word in words]
    for lines, expected in (
        ([first, second], 1),
        ([*errors, first, second], 1),
        ([second, first], 0),
        ([first, *["between\n"] * 30, second], 0),
    ):
        path = tmp_path / "log"
        path.write_text("".join(lines))
        assert len(Scanner(rules).scan(path).hits) == expected


def test_fixed_texts() -> None:
    assert fixed_texts(r"cannot (open|read) file \d+") == ("cannot open file ", "cannot read file ")
    assert fixed_texts(r"[Oo]ut of .* memory") == ("out of ",)
    with pytest.raises(ValueError, match="no fixed text"):
        fixed_texts(r"\d+ (ab|\w+)")


def test_every_rule_is_found_by_its_texts() -> None:
    """What the search skips a line for must be true: each pattern needs one of its texts."""
    for rule in read_rules():
        for pattern, texts in zip(rule.patterns, rule.texts, strict=True):
            assert min(map(len, texts)) >= MIN_TEXT
            assert not pattern.search("")


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


def test_lines_that_differ_in_digits_alone_are_all_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_scan, "FEW_LINES", 0)
    path = tmp_path / "log"
    path.write_text("OSError: [Errno 5] oh\n" * 30 + "OSError: [Errno 28] oh\n")
    found = Scanner(read_rules()).scan(path)
    assert [(hit.rule.id, hit.line.number) for hit in found.hits] == [("disk-full", 31)]
    assert [line.number for line in found.errors] == list(range(1, log_scan.KEPT_ERRORS + 1))
