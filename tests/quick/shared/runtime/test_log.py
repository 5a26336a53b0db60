# SPDX-License-Identifier: Apache-2.0
"""What of a stage's output a person sees, and what the log file keeps."""

import subprocess
import sys
from pathlib import Path

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


def say(log: Path, how: str, **environment: str) -> str:
    command = [sys.executable, "-c", STAGE, str(log), how]
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
