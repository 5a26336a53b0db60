# SPDX-License-Identifier: Apache-2.0
"""The demo, made once for all engine tests: its target, its states, its head.

With EYRIE_TEST_WORKSPACE set to a workspace that `make demo` filled, that one is used.
"""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "compose" / "recipes" / "demo" / "recipe.yaml"


@dataclasses.dataclass(frozen=True)
class Demo:
    """A finished demo, and what running it looked like."""

    workspace: Path
    seconds: float | None  # None where an earlier workspace was taken
    stdout: str

    @property
    def target(self) -> Path:
        return self.workspace / "targets" / "demo"

    @property
    def run(self) -> Path:
        return self.workspace / "demo"

    @property
    def export(self) -> Path:
        return self.run / "export"


def ops(workspace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One of the commands that `make demo` is made of."""
    command = [sys.executable, "-m", "stages.ops", *arguments, "--workspace", str(workspace)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=1500)


def run_demo(workspace: Path) -> Demo:
    """What `make demo` does once its dependencies are installed."""
    started_s = time.monotonic()
    made = ops(workspace, "make-target", str(workspace / "targets" / "demo"))
    assert made.returncode == 0
    done = ops(workspace, "run", "--recipe", str(RECIPE))
    assert done.returncode == 0
    return Demo(workspace, time.monotonic() - started_s, done.stdout)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    if given := os.environ.get("EYRIE_TEST_WORKSPACE"):
        workspace = Path(given).absolute()
        again = ops(workspace, "run", "--recipe", str(RECIPE))
        assert again.returncode == 0
        return Demo(workspace, None, again.stdout)
    return run_demo(tmp_path_factory.mktemp("demo"))
