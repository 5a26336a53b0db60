# SPDX-License-Identifier: Apache-2.0
"""The command that fetches the real target, as its own process, from a hub that takes its time."""

import signal
import subprocess
import sys
import time
from pathlib import Path

SLOW_HUB = """
import runpy, sys, time
from stages.demo.real import target

def download(folder, *_):
    (folder / "model.safetensors").write_bytes(b"half of it")
    print("loading", flush=True)
    time.sleep(60)

target._from_hub = download
sys.argv = ["demo", "real-target", sys.argv[1]]
runpy.run_module("stages.demo", run_name="__main__")
"""


def test_sigterm_breaks_off_the_download_and_keeps_nothing(tmp_path: Path) -> None:
    out = tmp_path / "target"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_HUB, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGTERM)
    began_s = time.monotonic()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143, told
    assert time.monotonic() - began_s < 30
    assert not list(tmp_path.iterdir())
