# SPDX-License-Identifier: Apache-2.0
"""The table of failures: how each is provoked, and the rule that must name it.

Those without an engine come first; `ENGINE` below starts vLLM.
"""

import contextlib
import dataclasses
import fcntl
import http.server
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from shared import files
from tests.models import tiny_llama
from tests.provoke.world import World, children, python

ALL = ("synth", "dump", "train")


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    expect: str
    stage: str
    provoke: Callable[[World], None]
    needs: tuple[str, ...] = ()
    is_console: bool = False  # the stage keeps no log of it: what the console showed is all


CASES: list[Case] = []
Provoke = Callable[[World], None]


def case(
    name: str, expect: str, stage: str, *, needs: tuple[str, ...] = (), console: bool = False
) -> Callable[[Provoke], Provoke]:
    def keep(provoke: Provoke) -> Provoke:
        CASES.append(Case(name, expect, stage, provoke, needs, console))
        return provoke

    return keep


# Flags, recipes, inputs.


@case("empty-prompts", "no-rows", "synth")
def _(world: World) -> None:
    world.prompts([])
    world.run("synth")


@case("broken-prompts", "too-many-failed-rows", "synth")
def _(world: World) -> None:
    world.prompts(['{"prompt": "Hello"}', '{"prompt": "x"', '{"prompt": ""}'])
    world.run("synth")


@case("unusable-prompts", "no-usable-rows", "synth")
def _(world: World) -> None:
    world.prompts(['{"text": "Hello"}', '{"text": "you"}'])
    world.run("synth")


@case("no-prompts-file", "prompts-missing", "synth")
def _(world: World) -> None:
    world.run("synth", "--prompts", "nowhere.jsonl")


@case("unknown-recipe-key", "recipe-key-unknown", "synth", console=True)
def _(world: World) -> None:
    world.recipe("synth", temprature=0.5)
    world.run("synth")


@case("refused-setting", "setting-refused", "train", console=True)
def _(world: World) -> None:
    world.run("train", "--learning_rate", "fast")


@case("unknown-flag", "flag-unknown", "dump", console=True)
def _(world: World) -> None:
    world.run("dump", "--batch_size", "8")


@case("no-recipe", "recipe-missing", "train", console=True)
def _(world: World) -> None:
    (world.workspace / "recipe.yaml").unlink()
    world.run("train")


@case("hub-unreachable", "hub-unreachable", "synth")
def _(world: World) -> None:
    world.run("synth", "--target", "no-such-organisation/no-such-model")


@case("no-chat-template", "chat-template-missing", "synth")
def _(world: World) -> None:
    (world.target / "chat_template.jinja").unlink(missing_ok=True)
    path = world.target / "tokenizer_config.json"
    values = files.read_json(path)
    values.pop("chat_template", None)
    files.write_json(path, values)
    world.run("synth")


@case("broken-tokenizer", "tokenizer-broken", "synth")
def _(world: World) -> None:
    (world.target / "tokenizer.json").write_text("{}")
    world.run("synth")


@case("broken-target-config", "target-config-broken", "synth")
def _(world: World) -> None:
    (world.target / "config.json").write_text('{"hidden_size": 8}')
    world.run("synth")


@case("cut-weights", "target-weights-broken", "dump", needs=("synth",))
def _(world: World) -> None:
    path = world.target / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5])
    world.run("dump")


@case("no-weights", "target-weights-missing", "dump", needs=("synth",))
def _(world: World) -> None:
    (world.target / "model.safetensors").unlink()
    world.run("dump")


@case("wrong-layer-ids", "aux-layers-bad", "dump", needs=("synth",))
def _(world: World) -> None:
    world.run("dump", "--aux_layers", "5,4,2")


@case("shallow-target", "aux-layers-too-few", "dump", needs=("synth",))
def _(world: World) -> None:
    world.config(num_hidden_layers=4)
    world.run("dump")


@case("other-interpreter", "python-package-missing", "dump", console=True)
def _(world: World) -> None:
    words = ["/usr/bin/env", "-i", "PATH=/usr/bin:/bin", sys.base_prefix + "/bin/python3", "-S"]
    world.command([*words, "-m", "stages.dump", "--recipe", "recipe.yaml"])


# Artifacts and parents.


@case("no-parent", "parent-missing", "dump")
def _(world: World) -> None:
    world.run("dump")


@case("recipe-changed-after", "parent-settings-differ", "dump", needs=("synth",))
def _(world: World) -> None:
    world.run("dump", "--max_length_tokens", "48")


@case("other-configuration", "artifact-of-another-configuration", "train", needs=ALL)
def _(world: World) -> None:
    world.run("train", "--learning_rate", "0.5")


@case("parent-file-cut", "parent-file-changed", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    shard = sorted(world.folder("dump").glob("shard_*.pt"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    world.run("train")


@case("corrupt-shard", "shard-broken", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    shard = sorted(world.folder("dump").glob("shard_*.pt"))[0]
    shard.write_bytes(os.urandom(shard.stat().st_size))
    world.run("train")


@case("corrupt-conversations", "conversations-broken", "dump", needs=("synth",))
def _(world: World) -> None:
    part = sorted(world.folder("synth").glob("part-*.parquet"))[0]
    part.write_bytes(os.urandom(part.stat().st_size))
    world.run("dump")


@case("corrupt-token-counts", "token-counts-broken", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    path = world.folder("dump") / "token_freq.pt"
    path.write_bytes(os.urandom(path.stat().st_size))
    world.run("train")


@case("corrupt-checkpoint", "checkpoint-broken", "train", needs=ALL)
def _(world: World) -> None:
    (world.folder("train") / "manifest.json").unlink()
    for path in (world.folder("train") / "checkpoints").rglob("*.pt"):
        if not path.is_symlink():
            path.write_bytes(os.urandom(2000))
    world.run("train")


@case("target-replaced", "target-changed-since", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    tiny_llama(world.target, seed=9)
    world.run("train")


@case("two-at-once", "folder-busy", "dump", needs=("synth",))
def _(world: World) -> None:
    path = world.folder("dump") / ".lock"
    path.parent.mkdir(parents=True)
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        world.run("dump")


@case("too-large-draft-vocabulary", "draft-vocabulary-too-large", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    world.run("train", "--draft_vocab_size", "100000")


@case("other-vocabulary-warm-start", "warm-start-differs", "train", needs=ALL)
def _(world: World) -> None:
    head = world.workspace / "head"
    (world.workspace / "run" / "export").rename(head)
    world.run("train", "--init_from", str(head), "--draft_vocab_size", "64", "--overwrite", "true")


# Data that is wrong.


@case("nan-weights", "states-not-finite", "dump")
def _(world: World) -> None:
    path = world.target / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b"}]}
    ]
    (world.workspace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    world.run("dump", "--conversations", "rows.jsonl", "--min_agreement", "0")


@case("nan-states", "loss-nan", "train", needs=("synth", "dump"))
def _(world: World) -> None:
    for path in world.folder("dump").glob("shard_*.pt"):
        shard = torch.load(path, weights_only=True)
        shard["hidden_states"][::3] = float("nan")
        size = path.stat().st_size
        torch.save(shard, path)
        if path.stat().st_size != size:
            _forge_size(world.folder("dump"), path)
    world.run("train")


def _forge_size(folder: Path, path: Path) -> None:
    manifest = files.read_json(folder / "manifest.json")
    manifest["files"][path.name]["bytes"] = path.stat().st_size
    files.write_json(folder / "manifest.json", manifest)


@case("answers-of-another-target", "answers-of-another-target", "dump", needs=("synth",))
def _(world: World) -> None:
    import pyarrow.parquet

    for path in world.folder("synth").glob("part-*.parquet"):
        table = pyarrow.parquet.read_table(path)
        ids = [row[:8] + row[:7:-1] for row in table["input_ids"].to_pylist()]
        position = table.schema.get_field_index("input_ids")
        column = pyarrow.array(ids, table.schema.field("input_ids").type)
        table = table.set_column(position, table.schema.field("input_ids"), column)
        pyarrow.parquet.write_table(table, path)
        _forge_size(world.folder("synth"), path)
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
        f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_DATA, ({900 << 20},) * 2)"
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


@case("rank-killed", "killed-bare", "train", needs=("synth", "dump"), console=True)
def _(world: World) -> None:
    def kill(world: World, process: "subprocess.Popen[str]") -> None:
        world.wait_for("train", "draft vocabulary")
        time.sleep(3)
        ranks = [pid for pid, name in children(process.pid) if "stages.train" in name]
        os.kill(ranks[1], signal.SIGKILL)

    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
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


# With vLLM.


@case("port-taken", "port-taken", "synth")
def _(world: World) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        world.recipe("synth", server_args={"port": taken.getsockname()[1]})
        world.run("synth")


@case("unknown-server-option", "server-option-unknown", "synth")
def _(world: World) -> None:
    world.recipe("synth", server_args={"no-such-option": 1})
    world.run("synth")


@case("bad-server-option", "server-option-value", "synth")
def _(world: World) -> None:
    world.recipe("synth", server_args={"tokenizer-mode": "none-such", "max-num-seqs": "many"})
    world.run("synth")


@case("unsupported-architecture", "architecture-unsupported", "synth")
def _(world: World) -> None:
    world.config(architectures=["NoSuchForCausalLM"])
    world.run("synth")


@case("unknown-model-type", "transformers-too-old", "synth")
def _(world: World) -> None:
    world.config(model_type="nosuch", architectures=["NosuchForCausalLM"])
    world.run("synth")


@case("custom-code", "trust-remote-code", "synth")
def _(world: World) -> None:
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    world.config(model_type="own", auto_map=auto, architectures=["OwnModel"])
    (world.target / "own.py").write_text(
        "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel\n"
    )
    world.run("synth")


@case("rows-longer-than-target", "max-length-over-model", "synth")
def _(world: World) -> None:
    world.run("synth", "--max_length_tokens", "100000")


@case("kv-cache-too-small", "kv-cache-too-small", "synth")
def _(world: World) -> None:
    world.recipe("synth", server_args={"kv-cache-memory-bytes": 65536})
    world.run("synth", "--max_length_tokens", "2000")


@case("too-little-shm", "shm-too-small", "synth")
def _(world: World) -> None:
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    world.run("synth", before=("unshare", "--mount", "sh", "-c", mount, "sh"))


@case("uneven-tensor-parallel", "tensor-parallel-heads", "synth")
def _(world: World) -> None:
    world.run("synth", "--tensor_parallel_size", "3")


@case("cpu-memory-taken", "cpu-memory-taken", "synth")
def _(world: World) -> None:
    world.recipe("synth", server_env={"VLLM_CPU_KVCACHE_SPACE": "4000"})
    world.run("synth")


@case("server-not-ready", "server-not-ready", "synth")
def _(world: World) -> None:
    world.run("synth", "--startup_timeout_s", "3")


@case("vllm-command", "version-metadata", "synth", console=True)
def _(world: World) -> None:
    vllm = str(Path(sys.executable).parent / "vllm")
    world.command(python(vllm, "serve", str(world.target)))


@case("server-killed", "engine-killed", "synth")
def _(world: World) -> None:
    world.prompts([json.dumps({"prompt": f"Tell me of {n}."}) for n in range(300)])
    world.recipe("synth", max_restarts=0, max_tokens=40)
    world.run("synth", watch=_kill_when("synth", "rows=", "api_server"))


@case("engine-killed-in-dump", "engine-killed", "dump", needs=("synth",))
def _(world: World) -> None:
    world.run("dump", "--backend", "vllm", watch=_kill_first_engine)


def _kill_when(
    stage: str, text: str, name: str
) -> Callable[[World, "subprocess.Popen[str]"], None]:
    def kill(world: World, process: "subprocess.Popen[str]") -> None:
        world.wait_for(stage, text)
        found = [pid for pid, command in children(process.pid) if name in command]
        os.kill(found[0], signal.SIGKILL)

    return kill


def _kill_first_engine(world: World, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for pid, command in children(process.pid):
            if "EngineCore" in command or "spawn_main" in command:
                time.sleep(3)
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(0.1)


@case("no-hooks", "no-hooks", "dump")
def _(world: World) -> None:
    from transformers import Gemma2Config

    shape = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "vocab_size": 512,
    }
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = Gemma2Config(architectures=["Gemma2ForCausalLM"], **shape)
    config.save_pretrained(world.target)
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b"}]}
    ]
    (world.workspace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    world.run("dump", "--conversations", "rows.jsonl", "--backend", "vllm")


@case("unknown-engine-option", "engine-options-unknown", "bench", needs=ALL)
def _(world: World) -> None:
    world.recipe("bench", engine_args={"no_such_option": 1}, prompts="prompts.jsonl")
    world.run("bench")


@case("too-deep-draft", "draft-too-deep", "bench", needs=ALL)
def _(world: World) -> None:
    world.run("bench", "--prompts", "prompts.jsonl", "--num_speculative_tokens", "500")


@case("bench-rows-too-long", "bench-rows-too-long", "bench", needs=ALL)
def _(world: World) -> None:
    world.run("bench", "--prompts", "prompts.jsonl", "--max_tokens", "4000")


@case("untrained-head", "acceptance-near-one", "bench", needs=ALL)
def _(world: World) -> None:
    head = world.workspace / "run" / "export"
    tensors = load_file(head / "model.safetensors")
    tensors["lm_head.weight"].normal_(0, 0.02)
    save_file(tensors, head / "model.safetensors", metadata={"format": "pt"})
    world.run("bench", "--prompts", "prompts.jsonl", "--max_tokens", "32")


@case("bench-clean", "", "bench", needs=ALL)
def _(world: World) -> None:
    world.run(
        "bench", "--prompts", "prompts.jsonl", "--max_tokens", "32", "--min_acceptance_length", "1"
    )
