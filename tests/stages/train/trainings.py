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


# `python -m stages.train`, but once a checkpoint of a step or a later one is on the disk, it takes no
# step before a signal: it cannot be done before whoever waits for the checkpoint has seen it.
HALTING = """
import runpy, sys, time
from pathlib import Path
from shared.runtime.process import stop_requested
from stages.train.loop.trainer import Trainer

folder, step = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
take_step, deadline_s = Trainer._take_step, time.monotonic() + 600

def halting(self, *step_of):
    if any(int(path.stem[5:]) >= step for path in folder.glob("step_*.pt")):
        (folder / "halted").touch()
        while not stop_requested() and time.monotonic() < deadline_s:
            time.sleep(0.01)
    take_step(self, *step_of)

Trainer._take_step = halting
runpy.run_module("stages.train", run_name="__main__", alter_sys=True)
"""


def halting(workspace: Path, step: int) -> list[str]:
    """The command of a training that halts once a checkpoint of this step is there."""
    python, _, _, *arguments = command(workspace, "train")
    folder = workspace / "run" / "train" / "checkpoints"
    (folder / "halted").unlink(missing_ok=True)
    return [python, "-c", HALTING, str(folder), str(step), *arguments]


def wait_until_halted(workspace: Path, process: "subprocess.Popen[bytes]") -> None:
    halted = workspace / "run" / "train" / "checkpoints" / "halted"
    deadline = time.monotonic() + 200
    while not halted.exists():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def interrupt_after_a_checkpoint(workspace: Path, how: signal.Signals) -> int:
    process = subprocess.Popen(halting(workspace, 1), cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until_halted(workspace, process)
    process.send_signal(how)
    return process.wait(timeout=200)


def start_ranks(
    workspace: Path, num_ranks: int, words: list[str] | None = None
) -> list[subprocess.Popen[bytes]]:
    """The stage, or a command in its place, as torchrun starts it."""
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
            words or command(workspace, "train"),
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(num_ranks)
    ]


def kill_ranks_at(workspace: Path, num_ranks: int, step: int) -> None:
    """Train until a checkpoint of this step is there, then kill all ranks."""
    processes = start_ranks(workspace, num_ranks, halting(workspace, step))
    wait_until_halted(workspace, processes[0])
    for process in processes:
        process.kill()
        process.wait()
