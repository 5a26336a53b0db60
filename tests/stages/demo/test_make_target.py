# SPDX-License-Identifier: Apache-2.0
"""The command that makes the demo's target, as its own process."""

import signal
import subprocess
import sys
from pathlib import Path


def test_sigterm_ends_it_at_once_with_143(tmp_path: Path) -> None:
    out = tmp_path / "target"
    command = [sys.executable, "-m", "stages.demo", "make-target", str(out), "--steps", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if "step 1 of" in line:
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143  # the steps to come take hours
    assert not out.exists()
