# SPDX-License-Identifier: Apache-2.0
"""A recipe, and the chain as the stages read it, for tests of the chain before it starts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from shared.paths import RunPaths
from shared.settings import build
from stages.bench.config import BenchConfig
from stages.dump.config import DumpConfig
from stages.ops.chain import processes
from stages.ops.chain.machine import Machine
from stages.ops.chain.preflight import checks
from stages.ops.chain.rows import Looks
from stages.ops.config import RunChainConfig
from stages.synth.config import SynthConfig
from stages.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[4]
GIB = 1 << 30
CPU = Machine((), 64 * GIB, GIB)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
TENSORS = {
    "model.embed_tokens.weight": torch.zeros(512, 64).bfloat16(),
    "model.norm.weight": torch.ones(64).bfloat16(),
    "lm_head.weight": torch.zeros(512, 64).bfloat16(),
}  # 131,200 bytes
RECIPE: dict[str, dict[str, Any]] = {
    "run": {"target": "model", "max_length_tokens": 64, "draft_vocab_size": 128},
    "synth": {"prompts": "prompts.jsonl"},
    "dump": {"backend": "hf"},
    "train": {},
    "bench": {"prompts": "held_out.jsonl", "max_prompts": 2, "max_tokens": 64},
}
KEPT = {"mode": "keep", "prompts": "answered.jsonl"}  # synth, without an engine
CONFIGS = {"synth": SynthConfig, "dump": DumpConfig, "train": TrainConfig, "bench": BenchConfig}


def make_workspace(workspace: Path) -> Path:
    """A target's folder as far as anything looks before it is loaded, prompts, and a recipe."""
    folder = workspace / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    save_file(TENSORS, folder / "model.safetensors")
    prompts = [json.dumps({"prompt": f"say {n}"}) for n in range(5)]
    (workspace / "prompts.jsonl").write_text("\n".join(prompts))
    answered = [json.dumps({"question": f"say {n}", "response": f"{n}"}) for n in range(5)]
    (workspace / "answered.jsonl").write_text("\n".join(answered))
    held_out = [json.dumps({"prompt": f"say nothing of {n}"}) for n in range(5)]
    (workspace / "held_out.jsonl").write_text("\n".join(held_out))
    write(workspace, {})
    return workspace


def write(workspace: Path, changes: Mapping[str, dict[str, Any]]) -> Path:
    """The recipe with these settings on top."""
    path = workspace / "recipe.yaml"
    sections = {name: section | changes.get(name, {}) for name, section in RECIPE.items()}
    path.write_text(yaml.safe_dump(sections))
    return path


def config(workspace: Path, **flags: str) -> RunChainConfig:
    needed = {"recipe": str(workspace / "recipe.yaml"), "workspace": str(workspace)}
    return build(RunChainConfig, {**needed, **flags})


def steps(
    workspace: Path, changes: Mapping[str, dict[str, Any]] | None = None
) -> list[processes.Step]:
    """The chain as the stages read the recipe, asked here instead of in processes of their own."""
    path = write(workspace, changes or {})
    chain = RunChainConfig(recipe=path, workspace=workspace)
    return asked_here(chain, tuple(CONFIGS), RunPaths(workspace, "run"))


def asked_here(
    chain: RunChainConfig, stages: Sequence[str], paths: RunPaths
) -> list[processes.Step]:
    """What `processes.steps` gives, without processes."""
    flags = {"recipe": str(chain.recipe), "workspace": str(chain.workspace)}
    return [
        processes.Step(
            stage,
            build(CONFIGS[stage], flags).model_dump(mode="json"),
            processes.is_done(stage, paths),
        )
        for stage in stages
    ]


def problems(found: list[processes.Step], workspace: Path, machine: Machine = CPU) -> list[str]:
    return checks.problems(found, RunPaths(workspace, "run"), machine, Looks(workspace))
