# SPDX-License-Identifier: Apache-2.0
"""Answered rows, their dump, and a training on it, each as a process of one thread."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import make_synth, run, write_recipe
from tests.stages.train.trainings import TRAIN


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As many threads in every run: they decide the order of a sum."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def dumped(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("dumped")
    make_synth(workspace)
    done = run(workspace, "dump")
    assert done.returncode == 0, done.stderr
    return workspace


@pytest.fixture(scope="module")
def trained(dumped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("trained") / "workspace"
    shutil.copytree(dumped, workspace)
    write_recipe(workspace, **TRAIN)
    done = run(workspace, "train")
    assert done.returncode == 0, done.stderr
    return workspace


@pytest.fixture
def workspace(dumped: Path, tmp_path: Path) -> Path:
    shutil.copytree(dumped, tmp_path / "workspace")
    write_recipe(tmp_path / "workspace", **TRAIN)
    return tmp_path / "workspace"
