# SPDX-License-Identifier: Apache-2.0
"""A plan: everything that follows from a target's architecture, before it is shown."""

import dataclasses
from collections.abc import Mapping

from shared.contracts import layers
from shared.contracts.head_config import HeadConfig
from shared.errors import UserError
from shared.io.safetensors_files import TensorInfo
from stages.ops.chain import sizes
from stages.ops.plan import weights
from stages.ops.plan.architecture import Architecture
from stages.ops.plan.placement import Placement, dump_backend, place
from stages.ops.plan.weights import Weights
from stages.ops.tables import read_data


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a plan says.

    Attributes:
        backend: (dump's backend, why).
        placements: by GPU type; empty where the size of the weights is unknown.
    """

    model: str
    target: Architecture
    weights: Weights
    head: HeadConfig
    width_reason: str
    backend: tuple[str, str]
    placements: dict[str, Placement]
    state_bytes_a_token: int

    def disk_bytes(self, samples: int, length: int) -> int:
        """Hidden states of so many samples of this length, in tokens."""
        return samples * length * self.state_bytes_a_token


def make_plan(
    model: str, target: Architecture, tensors: Mapping[str, TensorInfo] | None = None
) -> Plan:
    """Everything that follows from the architecture, and from its tensors where they are known.

    Raises:
        UserError: no draft head fits this target.
    """
    size = weights.weigh(target, tensors)
    width, reason = weights.draft_width(target)
    aux = layers.resolve_aux_layers(chosen_aux_layers(target), target.target.num_layers)
    head = HeadConfig.from_json(
        {**target.text, "intermediate_size": width, "max_position_embeddings": longest(target)},
        aux_layers=aux,
        draft_vocab_size=_draft_vocab_size(target),
    )
    state = sizes.train_bytes(head)
    backend = dump_backend(target)
    placements = {
        gpu: place(target, size.bytes, state, backend[0], facts)
        for gpu, facts in read_data("gpus.yaml").items()
        if size.bytes is not None
    }
    token_bytes = layers.state_bytes(1, len(aux), target.target.hidden_size)
    return Plan(
        model,
        target,
        size,
        head,
        reason,
        backend,
        placements,
        token_bytes,
    )


def chosen_aux_layers(target: Architecture) -> list[int] | None:
    """None for the default; spread ids for a target that is too shallow for it."""
    depth = target.target.num_layers
    return None if depth >= layers.MIN_LAYERS_FOR_DEFAULT else sorted({1, depth // 2, depth - 1})


def longest(target: Architecture) -> int:
    """Tokens that the target has positions for.

    Raises:
        UserError: its config.json says no number.
    """
    return target.size("max_position_embeddings") or 4096


def _draft_vocab_size(target: Architecture) -> int:
    return min(32_000, target.target.vocab_size)


def warnings(plan: Plan) -> list[str]:
    """What an operator must know of this target before the first GPU hour."""
    target, found = plan.target, []
    if reason := _refusal(target):
        found.append(f"dump and train cannot take it: {reason}")
    if target.raw.get("auto_map"):
        found.append("brings Python code of its own: read it, then set run.trust_remote_code")
    if plan.weights.bytes is None:
        found.append("its weights' size is unknown, so no GPUs are planned")
    if target.quantization and plan.backend[0] == "hf":
        found.append(
            "quantised: if its 16-bit original exists, name it in run.target_train for dump"
        )
    if target.window:
        found.append(f"sliding window of {target.window} tokens: TensorRT-LLM cannot capture it")
    if tokenizer := read_data("tokenizers.yaml").get(target.target.whole.get("model_type")):
        found.append(f"tokenizer: {tokenizer}")
    if chosen_aux_layers(target) is not None:
        found.append(
            f"only {target.target.num_layers} layers: the recipe names aux layers that fit"
        )
    return found


def _refusal(target: Architecture) -> str:
    """Why its class cannot be trained on; empty where it can."""
    from shared.target.classes import class_facts

    if target.unknown:
        return target.unknown
    try:
        class_facts(target.target)
    except UserError as error:
        return error.problem
    return ""
