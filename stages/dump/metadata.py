# SPDX-License-Identifier: Apache-2.0
"""What the states are, beside the states: `data_config.json` and `token_freq.pt`.

`data_config.json` has the sections that speculators writes (model, data, hidden_states, format,
reproducibility) plus what no peer states: the numbering of the layer ids, that the final state is
before the norm, and the hashes of the target and its tokenizer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shared import files, hidden_states, layers, provenance
from shared import target as targets
from shared.target import TargetConfig
from stages.dump.config import DumpConfig
from stages.dump.run import ShardPlan


def answer_counts(plans: Sequence[ShardPlan], vocab_size: int) -> torch.Tensor:
    """[V] int64: how often each token occurs in the answers; prompts are not counted."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for plan in plans:
        for ids, mask in zip(plan.input_ids, plan.loss_masks, strict=True):
            answers = torch.tensor(ids)[torch.tensor(mask, dtype=torch.bool)]
            counts += torch.bincount(answers, minlength=vocab_size)
    return counts


def _data_config(
    config: DumpConfig,
    target_config: TargetConfig,
    aux_layers: tuple[int, ...],
    plans: Sequence[ShardPlan],
    parent: Mapping[str, Any],
) -> dict[str, Any]:
    num_states, hidden_size = len(aux_layers) + 1, target_config.hidden_size
    return {
        "version": "2.0",
        "schema_version": hidden_states.SCHEMA_VERSION,
        "reproducibility": provenance.collect(argv=[], engine=config.engine),
        "model": {
            "target_model_path": config.run.target,
            "target_revision": config.run.target_revision,
            "target_weights_hash": targets.weights_hash(target_config.folder),
            "tokenizer_hash": targets.tokenizer_hash(target_config.folder),
            "model_type": target_config.model_type,
            "max_model_len": config.run.max_length_tokens,
            "hidden_size": hidden_size,
            "vocab_size": target_config.vocab_size,
            "num_hidden_layers": target_config.num_layers,
        },
        "data": {
            "synth_fingerprint": parent["fingerprint"],
            "seq_length": config.run.max_length_tokens,
            "num_samples": sum(len(plan.sample_ids) for plan in plans),
            "num_tokens": sum(plan.num_tokens for plan in plans),
        },
        "hidden_states": {
            "layer_ids": [*aux_layers, target_config.num_layers],
            "aux_layer_ids": list(aux_layers),
            "layer_id_convention": layers.LAYER_ID_CONVENTION,
            "final_hidden": "prenorm",
            "dtype": "bfloat16",
        },
        "format": {
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
        },
    }


def write_metadata(
    folder: Path,
    config: DumpConfig,
    target_config: TargetConfig,
    aux_layers: tuple[int, ...],
    plans: Sequence[ShardPlan],
    parent: Mapping[str, Any],
) -> list[str]:
    """Write both files; returns their names."""
    data_config = _data_config(config, target_config, aux_layers, plans, parent)
    files.write_json(folder / hidden_states.DATA_CONFIG, data_config)
    with files.atomic_path(folder / hidden_states.TOKEN_FREQ) as temporary:
        torch.save(answer_counts(plans, target_config.vocab_size), temporary)
    return [hidden_states.DATA_CONFIG, hidden_states.TOKEN_FREQ]
