# SPDX-License-Identifier: Apache-2.0
"""Bytes that a chain's stages hold and write, from the target's config and the stages' settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from shared.artifacts.manifest import read_manifest
from shared.contracts import layers
from shared.contracts.head_config import HeadConfig
from shared.contracts.head_variant import named_variant
from shared.io import files
from shared.io.safetensors_files import TensorInfo, tensor_bytes
from shared.paths import RunPaths
from shared.target.model import TargetConfig
from stages.ops.chain.processes import Step


def weight_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of the target's weights as they are stored."""
    return sum(map(tensor_bytes, tensors.values()))


def gpus_a_copy(step: Step) -> int:
    """GPUs that hold one copy of the target between them."""
    settings = step.settings
    return int(settings.get("tensor_parallel_size") or 1) * int(
        settings.get("pipeline_parallel_size") or 1
    )


def head_config(
    run: Mapping[str, Any], config: TargetConfig, train: Mapping[str, Any]
) -> HeadConfig:
    """The draft head that train would make.

    Raises:
        UserError: the target's config.json lacks a size, or the recipe does not fit it.
    """
    raw = dict(config.settings)
    if train.get("intermediate_size") is not None:
        raw["intermediate_size"] = train["intermediate_size"]
    return HeadConfig.from_json(
        raw,
        aux_layers=layers.resolve_aux_layers(run["aux_layers"], config.num_layers),
        draft_vocab_size=run["draft_vocab_size"],
        variant=named_variant(
            train.get("variant"),
            train.get("layer"),
            train.get("draft_window"),
            train.get("parallel_drafting"),
        ),
    )


def checkpoint_bytes(head: HeadConfig, optimizer: str = "muon") -> int:
    """One checkpoint: weights and the optimizer's moments, in float32.

    AdamW has two moments of each weight; Muon, the default, one of each matrix that it moves.
    """
    spared = head.num_matrix_parameters if optimizer == "muon" else 0
    return 4 * (3 * head.num_parameters - spared)


def checkpoints_bytes(head: HeadConfig, train: Mapping[str, Any]) -> int:
    """What train's checkpoints take: those kept, the best one, and the one being written."""
    return (int(train["keep_checkpoints"]) + 2) * checkpoint_bytes(head, train["optimizer"])


def train_bytes(head: HeadConfig, optimizer: str = "muon") -> int:
    """What one rank holds beside activations: the state, and frozen rows of the target in bfloat16.

    The state is a checkpoint's, and the gradients. The rows are the embedding, and lm_head's of the draft
    vocabulary; in float32 they take twice that.
    """
    frozen = (head.vocab_size + head.draft_vocab_size) * head.hidden_size
    return checkpoint_bytes(head, optimizer) + 4 * head.num_parameters + 2 * frozen


def certain_disk_bytes(left: Sequence[Step], config: TargetConfig, paths: RunPaths) -> int:
    """What will be written for certain: states of rows that are there, and checkpoints."""
    needed = 0
    for step in left:
        if step.stage == "dump":
            made = read_manifest(paths.stage("synth")) or {"facts": {}}
            aux = layers.resolve_aux_layers(step.run["aux_layers"], config.num_layers)
            tokens = int(made["facts"].get("tokens", 0))
            held = files.bytes_below(paths.stage("dump"), "*.pt")
            dtype = step.settings["state_dtype"]
            states = layers.state_bytes(tokens, len(aux), config.hidden_size, dtype)
            needed += max(0, held_states(step.settings, states) - held)
        if step.stage == "train":
            head = head_config(step.run, config, step.settings)
            needed += checkpoints_bytes(head, step.settings)
    return needed


def held_states(dump: Mapping[str, Any], states: int) -> int:
    """The most bytes of states that lie on the disk at a time: all, or what fills the window."""
    shards = dump["window_shards"]
    return min(states, shards * int(dump["shard_bytes"])) if shards else states
