# SPDX-License-Identifier: Apache-2.0
"""Failures of real vLLM engines and servers: 10 to 60 seconds each."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.provoke.table import ALL, case
from tests.provoke.world import World, children, python

# With vLLM.


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


@case("engine-meets-cut-weights", "weights-cut", "synth")
def _(world: World) -> None:
    path = world.target / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    world.run("synth")


@case("engine-meets-no-weights", "weights-missing", "synth")
def _(world: World) -> None:
    (world.target / "model.safetensors").unlink()
    world.run("synth")


@case("rows-longer-than-target", "max-length-over-model", "synth")
def _(world: World) -> None:
    world.run("synth", "--max_length_tokens", "100000")


@case("kv-cache-too-small", "kv-cache-too-small", "synth")
def _(world: World) -> None:
    world.recipe("synth", server_args={"kv-cache-memory-bytes": 400_000})
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


@case("engine-meets-broken-tokenizer", "tokenizer-fails", "synth", console=True)
def _(world: World) -> None:
    (world.target / "tokenizer.json").write_text("{}")
    server = "vllm.entrypoints.openai.api_server"
    world.command(python("-m", server, "--model", str(world.target), "--host", "127.0.0.1"))


@case("vllm-command", "version-metadata", "synth", console=True)
def _(world: World) -> None:
    vllm = str(Path(sys.executable).parent / "vllm")
    world.command(python(vllm, "serve", str(world.target)))


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


@case("bench-clean", "", "bench", needs=ALL)
def _(world: World) -> None:
    world.run(
        "bench", "--prompts", "prompts.jsonl", "--max_tokens", "32", "--min_acceptance_length", "1"
    )
