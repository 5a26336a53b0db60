# SPDX-License-Identifier: Apache-2.0
"""The demo, run once for all engine tests: its states, its head."""

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, MadeTarget, ops

_LARGE_BYTES = 1 << 20
RECIPE = ROOT / "compose" / "recipes" / "demo" / "recipe.yaml"


@pytest.fixture(scope="module", autouse=True)
def _no_process_groups_left() -> Iterator[None]:
    """What a file built of vLLM's layers in this process is gone before the next file's."""
    yield
    if state := sys.modules.get("vllm.distributed.parallel_state"):
        state.cleanup_dist_env_and_memory()


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


def beside(demo: Demo, workspace: Path) -> Path:
    """A workspace of its own with the demo's target and run in it: what is made there stays there."""
    (workspace / "targets").mkdir()
    (workspace / "targets" / "demo").symlink_to(demo.target)
    shutil.copytree(demo.run, workspace / "demo", copy_function=_link_or_copy)
    return workspace


def _link_or_copy(source: str, target: str) -> None:
    """The states are shared; locks and status files are not."""
    (os.link if Path(source).stat().st_size > _LARGE_BYTES else shutil.copy2)(source, target)


@pytest.fixture(scope="session")
def demo(demo_target: MadeTarget) -> Demo:
    """What `make demo` does once its dependencies are installed."""
    started_s = time.monotonic()
    done = ops(demo_target.workspace, "run", "--recipe", str(RECIPE))
    assert done.returncode == 0
    making_s = demo_target.seconds
    seconds = None if making_s is None else making_s + time.monotonic() - started_s
    return Demo(demo_target.workspace, seconds, done.stdout)
