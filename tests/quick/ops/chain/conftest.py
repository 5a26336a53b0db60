# SPDX-License-Identifier: Apache-2.0
"""What the chain's tests begin with."""

import shutil
from pathlib import Path

import pytest

from stages.ops.chain.preflight import packages
from tests.models import tiny_llama
from tests.quick.ops.chain.recipes import make_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return make_workspace(tmp_path)


@pytest.fixture
def real_target(workspace: Path) -> Path:
    """The same with a target that has a tokenizer, and weights."""
    shutil.rmtree(workspace / "model")
    tiny_llama(workspace / "model", max_length_tokens=256)
    return workspace


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages' packages, but torch for CUDA."""
    found = packages.installed

    def installed(python: str) -> dict[str, str]:
        return {**found(python), "torch": "2.13.0+cu130"}

    monkeypatch.setattr(packages, "installed", installed)
