# SPDX-License-Identifier: Apache-2.0
"""A run of which triage reads the logs."""

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run_folder = tmp_path / "run"
    (run_folder / "logs").mkdir(parents=True)
    (run_folder / "status").mkdir()
    return run_folder
