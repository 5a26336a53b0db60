# SPDX-License-Identifier: Apache-2.0
"""Trainings as processes: started, interrupted, and what they leave."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.ranks import free_port
from tests.runs import ROOT, command

TRAIN = {"epochs": 12, "eval_every_steps": 20, "checkpoint_every_steps": 4}


def weights(workspace: Path) -> dict[str, torch.Tensor]:
    return load_file(workspace / "run" / "export" / "model.safetensors")


def losses(workspace: Path) -> dict[int, float]:
    """Every recorded loss by its step."""
    lines = (workspace / "run" / "train" / "history.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def furthest(workspace: Path, other: Path) -> float:
    """The largest difference between two trainings' weights, after the last step or as exported."""
    latest = Path("run", "train", "checkpoints", "latest.pt")
    last, others = (
        torch.load(w / latest, weights_only=True)["weights"] for w in (workspace, other)
    )
    assert last.keys() == others.keys()
    pairs = [(last[name], others[name]) for name in last]
    exported, theirs = weights(workspace), weights(other)
    assert exported.keys() == theirs.keys()
    pairs += [(exported[name], theirs[name]) for name in exported]
    return max((ours.double() - its.double()).abs().max().item() for ours, its in pairs)


def interrupt_after_a_checkpoint(workspace: Path, how: signal.Signals) -> int:
    latest = workspace / "run" / "train" / "checkpoints" / "latest.pt"
    process = subprocess.Popen(command(workspace, "train"), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not latest.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    return process.wait(timeout=60)


def start_ranks(workspace: Path, num_ranks: int) -> list[subprocess.Popen[bytes]]:
    """The stage as torchrun starts it."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
    }
    return [
        subprocess.Popen(
            command(workspace, "train"),
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(num_ranks)
    ]


def kill_once_there(processes: list[subprocess.Popen[bytes]], path: Path) -> None:
    deadline = time.monotonic() + 90
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()
    for process in processes:
        process.kill()
        process.wait()
