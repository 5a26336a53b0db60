# SPDX-License-Identifier: Apache-2.0
"""Two gloo ranks against one process: the same loss and gradients, uneven documents, resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import CASES, free_port
from tests.runs import ROOT

TOLERANCE = 1e-5


def run_ranks(folder: Path, num_ranks: int, how: str, *arguments: str, on_cpu: bool = True) -> None:
    """Start `tests.ranks` as torchrun would start it on each of several nodes."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
        "ACCELERATE_USE_CPU": "true" if on_cpu else "false",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(folder), how, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
        )
        for rank in range(num_ranks)
    ]
    assert [process.wait(timeout=200) for process in processes] == [0] * num_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case, once in one process and once in two ranks under DDP and FSDP2."""
    folders = {}
    for name, ranks, how in (("single", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp2", 2, "fsdp2")):
        folders[name] = tmp_path_factory.mktemp(name)
        run_ranks(folders[name], ranks, how)
    return folders


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_single_process_s_loss_and_gradients(
    results: dict[str, Path], how: str, case: str
) -> None:
    expected = torch.load(results["single"] / f"{case}.pt", weights_only=True)
    found = torch.load(results[how] / f"{case}.pt", weights_only=True)
    assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert found["in_vocab_slots"] == expected["in_vocab_slots"]
    assert found["gradients"].keys() == expected["gradients"].keys()
    assert len(expected["gradients"]) == (17 if case == "p-eagle" else 13)
    for name, gradient in expected["gradients"].items():
        assert relative(found["gradients"][name], gradient) < TOLERANCE, name
    for name, weight in expected["weights"].items():
        assert found["weights"][name].shape == weight.shape
    # Muon's step; AdamW's first one is a sign, and a gradient near 0 has none that holds.
    matrices = [name for name in expected["weights"] if "proj" in name or name == "fc.weight"]
    assert len(matrices) == 8
    for name in matrices:
        assert relative(found["weights"][name], expected["weights"][name]) < TOLERANCE, name


@pytest.mark.parametrize("case", CASES)
def test_ranks_really_share_the_work(results: dict[str, Path], case: str) -> None:
    """Otherwise two ranks that each did everything would pass the test above."""
    for how in ("ddp", "fsdp2"):
        tokens = json.loads((results[how] / f"{case}-tokens.json").read_text())
        assert len(tokens) == 2
        assert sum(tokens) == sum(CASES[case][0])


def test_freed_memory_stays_so_that_no_page_is_asked_for_twice() -> None:
    """In a process of its own: the setting is for the whole process, and for good."""
    script = """
import resource, sys
import torch
from shared.runtime.processor import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(16 << 20)  # 64 MiB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
without = faults()
known = keep_freed_memory()
faults()  # the heap grows; small things may come to lie between the first of these
sys.exit(f"{known} {without} {faults()}")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    known, without, kept = done.stderr.split()[-3:]
    assert known == "True", "this test knows glibc alone"
    assert int(without) > 8 * 16_000
    assert int(kept) < int(without) / 4


def test_mkl_is_asked_to_keep_the_order_of_its_sums(tmp_path: Path) -> None:
    """Asked of MKL itself, in a process of its own: 1 is no promise, 2 is one for this processor."""
    script = """
import ctypes, sys
from pathlib import Path
import torch
from shared.settings import build
from stages.train.config import TrainConfig
from stages.train.loop.distributed import make_accelerator
make_accelerator(build(TrainConfig, {"target": "t", "workspace": "w"}), Path("w"))
torch.ones(4, 4) @ torch.ones(4, 4)
mkl = ctypes.CDLL(f"{torch.__path__[0]}/lib/libtorch_cpu.so")
sys.exit(f"branch {mkl.mkl_serv_cbwr_get(1)}")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr.split()[-2:] == ["branch", "2"]
