# SPDX-License-Identifier: Apache-2.0
"""Status files as stages write them, and what is read of them."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.artifacts.process_state import ProcessState
from shared.io import files
from shared.paths import RunPaths
from stages.ops.look.status import read_states


def state_of(workspace: Path, stage: str) -> ProcessState:
    (found,) = [state for state in read_states(RunPaths(workspace, "r")) if state.name == stage]
    return found


def write(workspace: Path, stage: str, **record: Any) -> Path:
    path = RunPaths(workspace, "r").status(stage)
    now = time.time()
    known = {"state": "running", "pid": 1, "host": "elsewhere", "started_s": now, "updated_s": now}
    # Whole, as a stage writes it: a watch may be reading. Python's own JSON, since some are damaged.
    files.write_text(path, json.dumps({**known, **record}))
    return path


def write_manifest(workspace: Path, stage: str) -> Path:
    path = RunPaths(workspace, "r").stage(stage) / "manifest.json"
    files.write_text(path, "{}")
    return path


def wait_for(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)
