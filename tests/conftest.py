# SPDX-License-Identifier: Apache-2.0
"""The demo's target, made once for all tests that start an engine, in containers or not; and the
installer of images.

EYRIE_TEST_WORKSPACE names a workspace that outlives a run of pytest: what `make demo` or an earlier
run made there is used, and what is missing is made there.
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

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
    """One of the operator's commands."""
    return _module("stages.ops", workspace, *arguments)


def train(workspace: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The stage train."""
    return _module("stages.train", workspace, *flags)


def make_target(workspace: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """The first command of `make demo`."""
    return _module("stages.demo", workspace, "make-target", str(target))


def real_target(workspace: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """The first command of `make real`, by its quarter tier."""
    return _module("stages.demo", workspace, "real-target", str(target))


def _module(module: str, workspace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments, "--workspace", str(workspace)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=1500)


@pytest.fixture(scope="session")
def demo_target(tmp_path_factory: pytest.TempPathFactory) -> MadeTarget:
    given = os.environ.get("EYRIE_TEST_WORKSPACE")
    workspace = Path(given).absolute() if given else tmp_path_factory.mktemp("demo")
    target = workspace / "targets" / "demo"
    if target.exists():
        return MadeTarget(workspace, None)
    started_s = time.monotonic()
    assert make_target(workspace, target).returncode == 0
    return MadeTarget(workspace, time.monotonic() - started_s)


@pytest.fixture(scope="session")
def installer() -> ModuleType:
    """What images install with, as a module."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "docker" / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["install"] = module
    spec.loader.exec_module(module)
    return module
