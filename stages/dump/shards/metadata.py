# SPDX-License-Identifier: Apache-2.0
"""What the states are, written beside them: `data_config.json` and `token_freq.pt`.

`data_config.json` has every key that speculators' data generation writes (model, data, hidden_states,
generation, format, reproducibility) plus what none of the other tools states: the numbering of the
layer ids, that the final state is before the norm, and the hashes of the target and its tokenizer.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shared.artifacts import provenance
from shared.contracts import hidden_states, layers
from shared.io import files
from shared.io.tensor_files import save_tensors
from shared.target import model as targets
from shared.target.model import TargetConfig
from shared.target.tokenizer import tokenizer_hash
from stages.dump.config import DumpConfig
from stages.dump.job import Job
from stages.dump.plan import Plan

METADATA = (hidden_states.DATA_CONFIG, hidden_states.TOKEN_FREQ)
_TEMPLATE_NOTE = "Token ids and answer spans are the server's own, or the target's chat template's"


def answer_counts(
    plan: Plan, vocab_size: int, sidecars: Sequence[Mapping[str, Any]]
) -> torch.Tensor:
    """[V] int64: how often each token occurs in the stored rows' answers; prompts do not count."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for shard, facts in zip(plan.shards, sidecars, strict=True):
        rows, failed = shard.read(), {failure["row"] for failure in facts["failed"]}
        for name, ids, mask in zip(*vars(rows).values(), strict=True):
            if name not in failed:
                answers = torch.tensor(ids)[torch.tensor(mask, dtype=torch.bool)]
                counts += torch.bincount(answers, minlength=vocab_size)
    return counts


def _format(config: DumpConfig, num_states: int, hidden_size: int) -> dict[str, Any]:
    """The layout of the files, as `data_config.json` describes it."""
    is_fp8 = config.state_dtype == "fp8"
    if config.layout == "samples":
        states = "list[torch.bfloat16]"
        schema: dict[str, Any] = {
            "input_ids": {"dtype": "torch.long", "shape": "[seq_len]"},
            "hidden_states": {
                "dtype": f"{states}, all but the last torch.float8_e4m3fn" if is_fp8 else states,
                "shape": f"list of [seq_len, {hidden_size}]",
                "num_tensors": num_states,
            },
            "loss_mask": {"dtype": "torch.long", "shape": "[seq_len]"},
        }
        if is_fp8:
            schema["scales"] = {"dtype": "torch.bfloat16", "shape": f"[seq_len, {num_states - 1}]"}
        pattern, version = "samples/data_{idx}.pt", 1
    else:
        shape = f"[T, {num_states}, {hidden_size}]"
        schema = {
            "input_ids": {"dtype": "torch.int32", "shape": "[T]"},
            "loss_mask": {"dtype": "torch.uint8", "shape": "[T]"},
            "hidden_states": {"dtype": "torch.bfloat16", "shape": shape},
            "offsets": {"dtype": "torch.int64", "shape": "[N+1]"},
            "sample_ids": {"dtype": "list[str]", "shape": "[N]"},
        }
        if is_fp8:
            shape = f"[T, {num_states - 1}, {hidden_size}]"
            schema |= {
                "hidden_states": {"dtype": "torch.float8_e4m3fn", "shape": shape},
                "scales": {"dtype": "torch.bfloat16", "shape": f"[T, {num_states - 1}]"},
                "final_states": {"dtype": "torch.bfloat16", "shape": f"[T, {hidden_size}]"},
            }
        pattern, version = "shard_{index:05d}.pt", hidden_states.SCHEMA_VERSION
    return {
        "layout": config.layout,
        "file_pattern": pattern,
        "data_format_version": version,
        "schema": schema,
    }


def _model(config: DumpConfig, target_config: TargetConfig) -> dict[str, Any]:
    return {
        "target_model_path": config.run.target_train or config.run.target,
        "target_revision": config.run.target_revision,
        "target_weights_hash": targets.weights_hash(target_config.folder),
        "tokenizer_hash": tokenizer_hash(target_config.folder),
        "model_type": target_config.model_type,
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.engine_args.get("gpu_memory_utilization"),
        "max_model_len": config.run.max_length_tokens,
        "hidden_size": target_config.hidden_size,
        "vocab_size": target_config.vocab_size,
        "num_hidden_layers": target_config.num_layers,
    }


def _data_config(job: Job, plan: Plan, sidecars: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    config, source = job.config, job.source
    made = provenance.collect(argv=sys.argv, engine=plan.backend)
    num_samples = plan.samples - sum(len(facts["failed"]) for facts in sidecars)
    return {
        "version": "2.0",
        "schema_version": hidden_states.SCHEMA_VERSION,
        "generated_at": made["finished"],
        "reproducibility": {
            **made,
            "command": shlex.join(sys.argv),
            "package_versions": made["packages"],
            "gpu": made["accelerator"],
        },
        "model": _model(config, job.target),
        "data": {
            "train_data_path": config.states or config.conversations or "synth",
            "parents": {name: parent["fingerprint"] for name, parent in source.parents.items()},
            "inputs": dict(source.inputs),
            "seq_length": config.run.max_length_tokens,
            "seed": config.run.seed,
            "max_samples": None,  # dump takes every row: sources are limited in synth
            "num_samples": num_samples,
            "num_tokens": sum(facts["tokens"] for facts in sidecars),
            "chat_template_note": _TEMPLATE_NOTE,
        },
        "hidden_states": {
            "layer_ids": [*job.aux_layers, job.target.num_layers],
            "description": "The states that feed the draft head, then the target's final state",
            "aux_layer_ids": list(job.aux_layers),
            "layer_id_convention": layers.LAYER_ID_CONVENTION,
            "final_hidden": "prenorm",
            "dtype": config.state_dtype,
        },
        "generation": {"backend": plan.backend, "engine_args": config.engine_args},
        "format": _format(config, len(job.aux_layers) + 1, job.target.hidden_size),
    }


def write_metadata(job: Job, plan: Plan, sidecars: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write both files; returns their names. `sidecars` are those of the plan's shards, in order."""
    data_config = _data_config(job, plan, sidecars)
    files.write_json(job.folder / hidden_states.DATA_CONFIG, data_config)
    counts = answer_counts(plan, job.target.vocab_size, sidecars)
    save_tensors(job.folder / hidden_states.TOKEN_FREQ, counts)
    return list(METADATA)
