# SPDX-License-Identifier: Apache-2.0
"""What the states are, beside the states: `data_config.json` and `token_freq.pt`.

`data_config.json` has the sections that speculators writes (model, data, hidden_states, format,
reproducibility) plus what no peer states: the numbering of the layer ids, that the final state is
before the norm, and the hashes of the target and its tokenizer.
"""

from pathlib import Path
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
from stages.dump.plan import Plan
from stages.dump.sources import RowSource


def answer_counts(plan: Plan, vocab_size: int) -> torch.Tensor:
    """[V] int64: how often each token occurs in the answers; prompts are not counted."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for shard in plan.shards:
        rows = shard.read()
        for ids, mask in zip(rows.input_ids, rows.loss_masks, strict=True):
            answers = torch.tensor(ids)[torch.tensor(mask, dtype=torch.bool)]
            counts += torch.bincount(answers, minlength=vocab_size)
    return counts


def _format(layout: str, num_states: int, hidden_size: int) -> dict[str, Any]:
    """The layout of the files, as `data_config.json` describes it."""
    if layout == "samples":
        return {
            "layout": "samples",
            "file_pattern": "samples/data_{idx}.pt",
            "schema": {
                "input_ids": {"dtype": "torch.long", "shape": "[seq_len]"},
                "hidden_states": {
                    "dtype": "list[torch.bfloat16]",
                    "shape": f"list of [seq_len, {hidden_size}]",
                    "num_tensors": num_states,
                },
                "loss_mask": {"dtype": "torch.long", "shape": "[seq_len]"},
            },
        }
    return {
        "layout": "shards",
        "file_pattern": "shard_{index:05d}.pt",
        "schema": {
            "input_ids": {"dtype": "torch.int32", "shape": "[T]"},
            "loss_mask": {"dtype": "torch.uint8", "shape": "[T]"},
            "hidden_states": {
                "dtype": "torch.bfloat16",
                "shape": f"[T, {num_states}, {hidden_size}]",
            },
            "offsets": {"dtype": "torch.int64", "shape": "[N+1]"},
            "sample_ids": {"dtype": "list[str]", "shape": "[N]"},
        },
    }


def _data_config(
    config: DumpConfig,
    target_config: TargetConfig,
    aux_layers: tuple[int, ...],
    plan: Plan,
    source: RowSource,
) -> dict[str, Any]:
    num_states, hidden_size = len(aux_layers) + 1, target_config.hidden_size
    return {
        "version": "2.0",
        "schema_version": hidden_states.SCHEMA_VERSION,
        "reproducibility": provenance.collect(argv=[], engine=plan.backend),
        "model": {
            "target_model_path": config.run.target_train or config.run.target,
            "target_revision": config.run.target_revision,
            "target_weights_hash": targets.weights_hash(target_config.folder),
            "tokenizer_hash": tokenizer_hash(target_config.folder),
            "model_type": target_config.model_type,
            "max_model_len": config.run.max_length_tokens,
            "hidden_size": hidden_size,
            "vocab_size": target_config.vocab_size,
            "num_hidden_layers": target_config.num_layers,
        },
        "data": {
            "train_data_path": config.conversations or "synth",
            "parents": {name: parent["fingerprint"] for name, parent in source.parents.items()},
            "inputs": dict(source.inputs),
            "seq_length": config.run.max_length_tokens,
            "num_samples": plan.samples,
            "num_tokens": plan.tokens,
        },
        "hidden_states": {
            "layer_ids": [*aux_layers, target_config.num_layers],
            "aux_layer_ids": list(aux_layers),
            "layer_id_convention": layers.LAYER_ID_CONVENTION,
            "final_hidden": "prenorm",
            "dtype": "bfloat16",
        },
        "format": _format(config.layout, num_states, hidden_size),
    }


def write_metadata(
    folder: Path,
    config: DumpConfig,
    target_config: TargetConfig,
    aux_layers: tuple[int, ...],
    plan: Plan,
    source: RowSource,
) -> list[str]:
    """Write both files; returns their names."""
    data_config = _data_config(config, target_config, aux_layers, plan, source)
    files.write_json(folder / hidden_states.DATA_CONFIG, data_config)
    save_tensors(folder / hidden_states.TOKEN_FREQ, answer_counts(plan, target_config.vocab_size))
    return [hidden_states.DATA_CONFIG, hidden_states.TOKEN_FREQ]
