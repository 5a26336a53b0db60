# SPDX-License-Identifier: Apache-2.0
"""What of a stage's output a person sees, and what the log file keeps."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.runtime import log

STAGE = """
import logging, os, subprocess, sys
from pathlib import Path
from shared.runtime.log import logged_to, start_logging

start_logging("dump")
with logged_to(Path(sys.argv[1]), is_quiet=sys.argv[2] == "is quiet") as replay:
    logging.getLogger("stages").info("begin\\na second line")
    logging.getLogger("vllm.platforms").warning("a library's record")
    # As vLLM's processes do: past Python's logging, with bars and half lines.
    words = "WARNING 11-28 15:00:00 [model.py:7] noise\\\\n    indented noise\\\\r 10%\\\\r 20%\\\\n"
    subprocess.run(["printf", "%b", words], check=True)
    os.write(1, b"half ")
    os.write(1, b"a line\\n")
    if sys.argv[2] == "fails":
        replay()
    logging.getLogger("stages").error("the end")
    os.write(2, b"no newline")
"""
NOISE = (
    "[vllm.platforms] ",
    "a library's record",
    "noise",
    "indented noise",
    " 10%",
    " 20%",
    "half a line",
    "no newline",
)


def say(kept: Path, how: str, **environment: str) -> str:
    command = [sys.executable, "-c", STAGE, str(kept), how]
    root = str(Path(__file__).resolve().parents[4])
    environment = {"PYTHONPATH": root, "PATH": "/usr/bin:/bin", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr


def test_the_terminal_gets_our_records_and_the_log_everything(tmp_path: Path) -> None:
    shown = say(tmp_path / "log", "ends well")
    assert [line.partition("Z ")[2] for line in shown.splitlines()] == [
        "INFO dump begin",
        "",
        "ERROR dump the end",
    ]
    assert "\n    a second line\n" in shown
    kept = (tmp_path / "log").read_text()
    assert all(words in kept for words in ("dump begin", "dump the end", *NOISE))


def test_of_a_quiet_process_the_terminal_gets_errors_only(tmp_path: Path) -> None:
    shown = say(tmp_path / "log", "is quiet")
    assert [line.partition("Z ")[2] for line in shown.splitlines()] == ["ERROR dump the end"]
    assert "INFO dump begin\n    a second line\n" in (tmp_path / "log").read_text()


def test_where_an_engine_failed_its_last_lines_are_shown_before_the_error(tmp_path: Path) -> None:
    shown = say(tmp_path / "log", "fails")
    assert shown.index("half a line") < shown.index("the end")
    assert "replay" not in (tmp_path / "log").read_text()
    assert "no newline" not in shown


def test_a_variable_shows_everything(tmp_path: Path) -> None:
    shown = say(tmp_path / "log", "ends well", EYRIE_SHOW_ENGINE="1")
    assert all(words in shown for words in NOISE)
    assert shown == (tmp_path / "log").read_text()


def test_what_a_library_of_the_hub_says_is_printed_once() -> None:
    says = """
import logging
from shared.runtime.log import start_logging

start_logging("ops")
import datasets, huggingface_hub
for library in (datasets, huggingface_hub):
    logging.getLogger(library.__name__ + ".http").warning("retrying")
"""
    command, root = [sys.executable, "-c", says], str(Path(__file__).resolve().parents[4])
    environment = {"PYTHONPATH": root, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, second = done.stderr.splitlines()
    assert first.startswith("[datasets.http] ") and first.endswith("WARNING ops retrying")
    assert second.startswith("[huggingface_hub.http] ")


def after_the_copier_stalls(monkeypatch: pytest.MonkeyPatch, stalls_s: float) -> None:
    """The thread that copies reads nothing for so long, as on a machine that has no time for it."""
    take = log._Copier._take

    def late(self: log._Copier, lines: list[bytes]) -> None:
        time.sleep(stalls_s)
        take(self, lines)

    monkeypatch.setattr(log._Copier, "_take", late)


def test_the_last_words_are_kept_however_late_they_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    after_the_copier_stalls(monkeypatch, 3.0)
    with log.logged_to(tmp_path / "log"):
        os.write(2, b"2026-01-01T00:00:00Z ERROR dump the end\n")
    assert "the end" in (tmp_path / "log").read_text()
    assert capfd.readouterr().err == "2026-01-01T00:00:00Z ERROR dump the end\n"


def test_a_child_that_outlives_the_block_is_not_waited_for(tmp_path: Path) -> None:
    with log.logged_to(tmp_path / "log"):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        os.write(2, b"a line\nhalf a line")
    assert (tmp_path / "log").read_text() == "a line\nhalf a line"
    assert child.poll() is None
    child.communicate(b"\n")


def test_an_engine_that_has_begun_a_line_does_not_hide_the_replay(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bar that draws itself: the word to the copier comes after what it drew last."""
    with log.logged_to(tmp_path / "log") as replay:
        os.write(1, b"the cause\n 10%")
        replay()
    assert "the cause\n 10%" in capfd.readouterr().err
    assert (tmp_path / "log").read_text() == "the cause\n 10%"
