# SPDX-License-Identifier: Apache-2.0
"""How many GPUs of a type each stage of a plan takes, and how they share the target.

Weights may fill three quarters of a GPU: the rest is for the KV cache and activations. Within a node
the target is split by tensor parallelism, over nodes by pipeline parallelism, which only vLLM's own
server does here: synth and bench can be larger than a node, dump cannot.
"""

import dataclasses
import math
from typing import Any

from shared.runtime.wording import counted
from stages.ops.chain.hooks import read_hooks
from stages.ops.plan.architecture import Architecture

_WEIGHT_SHARE = 0.75
# fp32 weights, gradients, AdamW's moments, and activations of the usual step beside them.
_TRAIN_SHARE = 0.6


@dataclasses.dataclass(frozen=True)
class Placement:
    """A target on GPUs of one type.

    Attributes:
        tensor_parallel: GPUs of a node that share each layer.
        pipeline_parallel: nodes that share the layers.
        copies: whole targets that a node holds side by side; 0 where it holds none.
        hf_gpus: GPUs that dump's backend hf spreads one copy over; 0 where vLLM captures.
        train_fits: whether one GPU holds the training state of the draft head.
    """

    gpus_a_node: int
    tensor_parallel: int
    pipeline_parallel: int
    copies: int
    hf_gpus: int
    train_fits: bool

    def of_stages(self) -> dict[str, str]:
        """What each stage is started with, in words."""
        split = f"tensor_parallel_size {self.tensor_parallel}"
        whole = split
        if self.pipeline_parallel > 1:
            whole += f", pipeline_parallel_size {self.pipeline_parallel} (nodes)"
        dump = f"{split}, data_parallel {self.copies}"
        if self.hf_gpus:
            dump = f"backend hf, spread over {self.hf_gpus}"
        sharing = "DDP" if self.train_fits else "FSDP2"
        return {
            "synth": whole,
            "dump": dump if self.copies else "does not fit a node",
            "train": f"{counted(self.gpus_a_node, 'rank')}, {sharing}",
            "bench": split if self.copies else whole,
        }


def place(
    target: Architecture, weights: int, train_bytes: int, backend: str, facts: dict[str, Any]
) -> Placement:
    """The fewest GPUs of one type that hold the target.

    Args:
        weights: bytes of the target's weights.
        train_bytes: bytes of the head's training state on one rank.
        backend: what dump captures with.
        facts: the type's row of `data/gpus.yaml`.
    """
    memory, a_node = facts["memory_gib"] * 2**30, int(facts["gpus_a_node"])
    room = memory * _WEIGHT_SHARE
    sizes = [n for n in (1, 2, 4, 8) if n <= a_node and target.num_heads % n == 0]
    fitting = [n for n in sizes if weights / n <= room]
    tensor_parallel = fitting[0] if fitting else sizes[-1]
    nodes = 1 if fitting else math.ceil(weights / (room * tensor_parallel))
    return Placement(
        a_node,
        tensor_parallel,
        nodes,
        a_node // tensor_parallel if fitting else 0,
        math.ceil(weights / room) if backend == "hf" else 0,
        train_bytes <= memory * _TRAIN_SHARE,
    )


def dump_backend(target: Architecture) -> tuple[str, str]:
    """(backend, why): what `backend: auto` would choose, as far as a table can say."""
    hooks = read_hooks()
    version = hooks["vllm"]
    if target.is_mla:
        return "hf", f"its attention is latent (MLA): vLLM {version} hands out no states of it"
    if target.is_hybrid:
        return "hf", (
            "a hybrid: vLLM has handed out states of zeros for such targets (its pull request 46301)"
        )
    if target.name not in hooks["architectures"]:
        return "hf", f"vLLM {version} has no hooks for {target.name}"
    return "vllm", f"vLLM {version} has hooks for {target.name}"
