# SPDX-License-Identifier: Apache-2.0
"""A stop signal inside a library's call, in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.runtime.process import is_alive, stopping_at_once
from tests.runs import ROOT

# A library that is broken off inside `try`, and what it does then.
BROKEN_OFF = """
import time
from shared.errors import Stopped
from shared.runtime import process

process.catch_stop_signals()
deadline_s = time.monotonic() + 30
try:
    with process.stopping_at_once("nothing is lost"):
        try:
            print("ready", flush=True)
            time.sleep(30)
        except Exception as error:
            print("swallowed", flush=True)
            {then}
    print("went on", flush=True)
except Stopped as stop:
    print(stop, flush=True)
time.sleep(3)  # outside the block nothing is raised any more
print("left", flush=True)
"""
GOES_ON = "while time.monotonic() < deadline_s: time.sleep(0.01)"  # as around an optional import
IS_DONE = "pass"
# As vLLM does where a model's module cannot be imported.
RAISES_ITS_OWN = "raise ValueError('the model failed to be inspected') from error"


@pytest.mark.parametrize("then", [GOES_ON, IS_DONE, RAISES_ITS_OWN])
def test_a_stop_that_a_library_swallows_ends_the_block_as_a_stop(then: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BROKEN_OFF.format(then=then)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    lines = told.splitlines()
    assert (lines[0], lines[-1]) == ("swallowed", "left")
    assert "stopped by a signal; nothing is lost." in lines[1]
    assert "went on" not in lines


def test_an_error_of_a_block_that_nobody_stopped_stays_itself() -> None:
    with pytest.raises(ValueError, match="its own"), stopping_at_once("nothing is lost"):
        raise ValueError("its own")


@pytest.mark.parametrize("error", [FileNotFoundError, ProcessLookupError])
def test_a_process_that_goes_while_it_is_looked_at_is_gone(
    monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    """Between the question whether there is one and the reading of its state."""

    def gone(*_: object, **__: object) -> str:
        raise error

    assert is_alive(os.getpid())
    monkeypatch.setattr(Path, "read_text", gone)
    assert not is_alive(os.getpid())


UNREAD = """
import os
from shared.runtime import process

process.expect_threads_to_outlive_the_work()
source, sink = os.pipe()
os.dup2(sink, 1)
os.close(sink), os.close(source)
print("words for nobody")
process.leave(75)
"""


def test_whoever_reads_no_more_does_not_change_the_exit_code() -> None:
    """As in `stage | head`."""
    environment = {"PYTHONPATH": str(ROOT)}  # output is buffered
    done = subprocess.run(
        [sys.executable, "-c", UNREAD], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (75, "")
