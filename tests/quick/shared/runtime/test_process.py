# SPDX-License-Identifier: Apache-2.0
"""A stop signal inside a library's call, in a process of its own."""

import signal
import subprocess
import sys

from tests.runs import ROOT

# A library that goes on after any exception, as around an optional import, and is done after 30 s.
SWALLOWS = """
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
        except Exception:
            print("swallowed", flush=True)
        while time.monotonic() < deadline_s:
            time.sleep(0.01)
    print("went on", flush=True)
except Stopped as stop:
    print(stop, flush=True)
time.sleep(3)  # outside the block nothing is raised any more
print("left", flush=True)
"""


def test_a_stop_that_a_library_swallows_is_raised_again_and_only_in_the_block() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SWALLOWS], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    lines = told.splitlines()
    assert (lines[0], lines[-1]) == ("swallowed", "left")
    assert "stopped by a signal; nothing is lost." in lines[1]
    assert "went on" not in lines
