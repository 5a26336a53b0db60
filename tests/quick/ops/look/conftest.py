# SPDX-License-Identifier: Apache-2.0
"""A stage that works."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.paths import RunPaths
from tests.conftest import ROOT

# A stage as far as its status goes: it says how far it is, and then nothing for a long time.
WORKER = """
import sys, time
from pathlib import Path
from shared.runtime import status
status.BEAT_S = 0.05
told = status.Status(Path(sys.argv[1]), period_s=0.0)
told.started()
for done in (10, 20, 30):
    time.sleep(0.02)
    told.progress(done, 120, "rows", answer_tokens_per_s=700)
print("working", flush=True)
time.sleep(600)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Any:
    command = [sys.executable, "-c", WORKER, str(RunPaths(tmp_path, "r").status("synth"))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
