# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check` on a machine without a card: all of it on a CPU at tiny shapes, and what it says there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import ROOT


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.gpu", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def test_every_part_of_it_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "figures"
    done = gpu_check("--device", "cpu", "--rounds", "1", "--threads", "1", "--out", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["tests"]["failed"] == []
    assert found["tests"]["passed"] >= 7
    assert [cell["shape"] for cell in found["cells"]] == ["S0", "S0-chat"]
    for cell in found["cells"]:
        assert 0 < cell["share_without_attention"] < cell["share"] < 1
        assert len(cell["kernels"]) == 10 and cell["peak_mib"] > 0
    page = out.with_suffix(".md").read_text()
    assert page == done.stdout[done.stdout.index("# gpu-check") :]
    assert "| S0-chat | 4 x 32 |" in page and "aten::mm" in page


def test_without_a_card_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    out = tmp_path / "figures"
    done = gpu_check("--out", str(out))
    assert done.returncode == 2
    assert done.stderr.startswith("gpu-check: no CUDA device.")
    assert not list(tmp_path.iterdir())
