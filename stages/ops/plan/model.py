# SPDX-License-Identifier: Apache-2.0
"""A plan: everything that follows from a target's architecture, before it is shown."""

import dataclasses

from shared.contracts import layers
from shared.contracts.head_config import HeadConfig
from stages.ops.chain import sizes
from stages.ops.plan import parameters
from stages.ops.plan.architecture import Architecture, read_data
from stages.ops.plan.placement import Placement, dump_backend, place


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a plan says."""

    model: str
    target: Architecture
    counted: parameters.Parameters
    weights: int
    head: HeadConfig
    width_reason: str
    backend: tuple[str, str]
    placements: dict[str, Placement]
    state_bytes_a_token: int

    def disk_bytes(self, samples: int, length: int) -> int:
        """Hidden states of so many samples of this length, in tokens."""
        return samples * length * self.state_bytes_a_token


def make_plan(model: str, target: Architecture) -> Plan:
    """Everything that follows from the architecture."""
    counted = parameters.count(target)
    weights = parameters.weight_bytes(target, counted)
    width, reason = parameters.draft_width(target)
    aux = layers.resolve_aux_layers(chosen_aux_layers(target), target.num_layers)
    head = HeadConfig.from_json(
        {**target.text, "intermediate_size": width, "max_position_embeddings": longest(target)},
        aux_layers=aux,
        draft_vocab_size=_draft_vocab_size(target),
    )
    state = sizes.train_bytes(head)
    backend = dump_backend(target)
    placements = {
        gpu: place(target, weights, state, backend[0], facts)
        for gpu, facts in read_data("gpus.yaml").items()
    }
    token_bytes = layers.state_bytes(1, len(aux), target.hidden_size)
    return Plan(
        model,
        target,
        counted,
        weights,
        head,
        reason,
        backend,
        placements,
        token_bytes,
    )


def chosen_aux_layers(target: Architecture) -> list[int] | None:
    """None for the default; spread ids for a target that is too shallow for it."""
    depth = target.num_layers
    return None if depth >= layers.MIN_LAYERS_FOR_DEFAULT else sorted({1, depth // 2, depth - 1})


def longest(target: Architecture) -> int:
    """Tokens that the target has positions for."""
    return int(target.text.get("max_position_embeddings") or 4096)


def _draft_vocab_size(target: Architecture) -> int:
    return min(32_000, target.vocab_size)


def warnings(plan: Plan) -> list[str]:
    """What an operator must know of this target before the first GPU hour."""
    target, found = plan.target, []
    if not target.is_known:
        found.append(f"model_type {target.model_type!r} is not one of those that were checked")
    if target.unknown_kinds:
        found.append(f"not counted: layers of the kind {', '.join(target.unknown_kinds)}")
    if target.is_vlm and not plan.counted.vision:
        found.append("not counted: its vision tower")
    if target.text.get("num_nextn_predict_layers"):
        found.append("not counted: its own multi-token-prediction layer, which nothing here loads")
    if target.raw.get("auto_map"):
        found.append("brings Python code of its own: read it, then set run.trust_remote_code")
    if target.quantization and plan.backend[0] == "hf":
        found.append(
            "quantised: where its 16-bit original exists, name it in run.target_train for dump"
        )
    if target.window:
        found.append(f"sliding window of {target.window} tokens: TensorRT-LLM cannot capture it")
    if target.left_out:
        where = "text_config" if "text_config" in target.raw else "the file"
        named = ", ".join(f'"{key}": {value}' for key, value in target.left_out.items())
        found.append(f"its config.json lacks sizes that the stages read: add to {where}: {named}")
    if tokenizer := target.family.get("tokenizer"):
        found.append(f"tokenizer: {tokenizer}")
    if chosen_aux_layers(target) is not None:
        found.append(f"only {target.num_layers} layers: the recipe names aux layers that fit")
    return found
