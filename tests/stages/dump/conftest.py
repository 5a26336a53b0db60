# SPDX-License-Identifier: Apache-2.0
"""Answered rows, and their dump by one process."""

import shutil
from pathlib import Path

import pytest

from stages.dump.run import run as dump
from tests.runs import make_synth
from tests.stages.dump.dumps import NUM_ROWS, config


@pytest.fixture(scope="session")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("answered")
    make_synth(workspace, num_rows=NUM_ROWS)
    return workspace


@pytest.fixture(scope="session")
def whole(answered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump folder of one process, undisturbed."""
    workspace = tmp_path_factory.mktemp("whole") / "workspace"
    shutil.copytree(answered, workspace)
    dump(config(workspace))
    return workspace / "run" / "dump"


@pytest.fixture
def workspace(answered: Path, tmp_path: Path) -> Path:
    shutil.copytree(answered, tmp_path / "workspace")
    return tmp_path / "workspace"
