# SPDX-License-Identifier: Apache-2.0
"""Wrong data, a machine that fails, servers and heads from elsewhere: no engine starts."""

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.provoke.table import case
from tests.provoke.world import World, children, python

# Data that is wrong.


# The machine.


@contextlib.contextmanager
def _small_disk(folder: Path, size: str, *, read_only: bool = False) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@case("killed", "vanished", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    def kill(world: World, process: "subprocess.Popen[str]") -> None:
        status = world.workspace / "run" / "status" / "train.json"
        world.wait_for("train", "draft vocabulary")
        while not status.exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)

    world.run("train", "--epochs", "500", watch=kill)


@case("stopped-by-time-limit", "", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    world.run("train", "--epochs", "5000", before=("timeout", "--signal=TERM", "25"))


@case("too-many-open-files", "file-limit", "synth")
def _(world: World) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (24, hard))
    try:
        world.run("synth")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@case("rank-killed", "rank-killed", "train", needs=("synth", "dump"), console=True)
def _(world: World) -> None:
    def kill(world: World, process: "subprocess.Popen[str]") -> None:
        world.wait_for("train", "draft vocabulary")
        time.sleep(3)
        ranks = [pid for pid, name in children(process.pid) if "stages.train" in name]
        os.kill(ranks[1], signal.SIGKILL)

    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "stages.train", "--recipe", str(world.workspace / "recipe.yaml")]
    words += ["--workspace", str(world.workspace), "--epochs", "5000"]
    world.command(python(*words), {"OMP_NUM_THREADS": "1"}, kill)


_TIED = """
import torch

class Head(torch.nn.Module):
    def __init__(self, vocabulary=512, drafted=128, width=64):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(vocabulary, width)
        self.lm_head = torch.nn.Linear(width, drafted, bias=False)

state = Head().state_dict()
state["lm_head.weight"] = state["embed_tokens.weight"]  # a saver that takes them for tied
Head().load_state_dict(state)
"""


@case("tied-resume", "tied-embeddings-resume", "train", console=True)
def _(world: World) -> None:
    world.command(python("-c", _TIED))


_PICKLED = """
import os, pathlib, sys, torch

os.chdir(sys.argv[1])
torch.save(pathlib.Path("x"), "states.pt")
torch.load("states.pt", weights_only=True)
"""


@case("pickled-states", "unpickling-refused", "train", console=True)
def _(world: World) -> None:
    world.command(python("-c", _PICKLED, str(world.workspace)))


# Servers that run already.


# Heads.
