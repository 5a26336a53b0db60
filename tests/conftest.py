# SPDX-License-Identifier: Apache-2.0
"""The demo's target, made once for all tests that start an engine, in containers or not.

With EYRIE_TEST_WORKSPACE set to a workspace that `make demo` filled, that one's is used.
"""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class MadeTarget:
    """A workspace with the demo's target in it."""

    workspace: Path
    seconds: float | None  # None where an earlier workspace was taken

    @property
    def folder(self) -> Path:
        return self.workspace / "targets" / "demo"


def ops(workspace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One of the commands that `make demo` is made of."""
    command = [sys.executable, "-m", "stages.ops", *arguments, "--workspace", str(workspace)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=1500)


@pytest.fixture(scope="session")
def demo_target(tmp_path_factory: pytest.TempPathFactory) -> MadeTarget:
    if given := os.environ.get("EYRIE_TEST_WORKSPACE"):
        return MadeTarget(Path(given).absolute(), None)
    workspace = tmp_path_factory.mktemp("demo")
    started_s = time.monotonic()
    made = ops(workspace, "make-target", str(workspace / "targets" / "demo"))
    assert made.returncode == 0
    return MadeTarget(workspace, time.monotonic() - started_s)
