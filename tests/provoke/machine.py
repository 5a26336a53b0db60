# SPDX-License-Identifier: Apache-2.0
"""Wrong data, a machine that fails, servers and heads from elsewhere: no engine starts."""

import contextlib
import http.server
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from shared.io import files
from tests.models import tiny_llama
from tests.provoke.table import ALL, case, conversations
from tests.provoke.world import World, children, python

# Data that is wrong.


@case("nan-weights", "states-not-finite", "dump")
def _(world: World) -> None:
    path = world.target / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    world.run("dump", *conversations(world), "--min_agreement", "0")


@case("nan-states", "loss-nan", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    for path in world.folder("dump").glob("shard_*.pt"):
        shard = torch.load(path, weights_only=True)
        shard["hidden_states"][::3] = float("nan")
        torch.save(shard, path)
        world.vouch("dump", path)
    world.run("train")


@case("answers-of-another-target", "answers-of-another-target", "dump", needs=("synth",))
def _(world: World) -> None:
    import pyarrow.parquet

    for path in world.folder("synth").glob("part-*.parquet"):
        table = pyarrow.parquet.read_table(path)
        ids = [
            row[:8] + [10 + (at * 37) % 380 for at in range(len(row) - 8)]
            for row in table["input_ids"].to_pylist()
        ]
        position = table.schema.get_field_index("input_ids")
        column = pyarrow.array(ids, table.schema.field("input_ids").type)
        table = table.set_column(position, table.schema.field("input_ids"), column)
        pyarrow.parquet.write_table(table, path)
        world.vouch("synth", path)
    world.run("dump")


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


@case("disk-too-small", "disk-too-small", "dump", needs=("synth",))
def _(world: World) -> None:
    with _small_disk(world.folder("dump"), "400k"):
        world.run("dump")


@case("disk-full", "disk-full", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    with _small_disk(world.folder("train"), "1m"):
        world.run("train")


@case("read-only", "read-only", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    with _small_disk(world.folder("train"), "1m", read_only=True):
        world.run("train")


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


@case("out-of-memory", "out-of-memory-host", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    limit = (
        f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_DATA, ({350 << 20},) * 2)"
    )
    run = "sys.argv[0] = 'train'; runpy.run_module('stages.train', run_name='__main__', alter_sys=True)"
    words = ["--recipe", str(world.workspace / "recipe.yaml"), "--workspace", str(world.workspace)]
    words += ["--batch_tokens", "1000000", "--epochs", "3"]
    world.command(python("-c", f"{limit}; {run}", *words))


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


@case("port-taken", "port-taken", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        world.run("train", environment={**ranks, "MASTER_PORT": str(taken.getsockname()[1])})


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


@case("endpoint-down", "endpoint-silent", "synth")
def _(world: World) -> None:
    world.run("synth", "--endpoints", "http://127.0.0.1:9")


@case("endpoint-foreign", "endpoint-refuses", "synth")
def _(world: World) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    world.run("synth", "--endpoints", f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()


# Heads.


@case("head-of-another-target", "head-of-another-target", "bench", needs=ALL)
def _(world: World) -> None:
    other = tiny_llama(world.workspace / "other", hidden_size=64)
    head = world.workspace / "run" / "export"
    world.run("bench", "--prompts", "prompts.jsonl", "--head", str(head), "--target", str(other))


@case("head-misread", "head-misread", "bench", needs=ALL)
def _(world: World) -> None:
    head = world.workspace / "head"
    (world.workspace / "run" / "export").rename(head)
    config = files.read_json(head / "config.json")
    config.pop("eagle_aux_hidden_state_layer_ids")
    files.write_json(head / "config.json", config)
    world.run("bench", "--prompts", "prompts.jsonl", "--head", str(head))


@case("no-head", "head-not-eagle3", "bench", needs=ALL)
def _(world: World) -> None:
    head = world.workspace / "head"
    head.mkdir()
    (head / "config.json").write_text("{}")
    world.run("bench", "--prompts", "prompts.jsonl", "--head", str(head))
