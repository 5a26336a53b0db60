# SPDX-License-Identifier: Apache-2.0
"""What a target is, from its config.json alone: its kind, its parameters, its bytes.

Legend: H hidden size, L layers, V vocabulary, E experts.

The counts are sums over the layers of the sizes that the config names. What a family's code adds
(norms on queries, biases, gates) stands in `data/families.yaml`. A vision tower is counted where its
kind is known, a layer kind that is not known makes the count incomplete, and the plan says so.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from shared.errors import UserError

DATA = Path(__file__).with_name("data")
# Names under which configs give the number of experts, those of a token, and an expert's width.
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
_ACTIVE = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token")
# Layer kinds without attention of their own that a hybrid's config names.
LINEAR = "linear_attention"


def read_data(name: str) -> Any:
    """One of the tables in `data/`."""
    return yaml.safe_load((DATA / name).read_text(encoding="utf-8"))


def _first(text: Mapping[str, Any], names: tuple[str, ...]) -> int:
    return next((int(text[name]) for name in names if text.get(name)), 0)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A target's config.json, understood as far as a plan needs it.

    Attributes:
        raw: the whole config.json.
        text: the part of its decoder, with the family's defaults.
        family: what `data/families.yaml` says of it.
        is_known: whether it says anything.
    """

    raw: dict[str, Any]
    text: dict[str, Any]
    family: dict[str, Any]
    is_known: bool

    @property
    def model_type(self) -> str:
        return str(self.text.get("model_type", ""))

    @property
    def name(self) -> str:
        """The class that serves it."""
        return str((self.raw.get("architectures") or ["unknown"])[0])

    @property
    def left_out(self) -> dict[str, Any]:
        """Sizes that its config.json leaves to the family's code, with the values there."""
        inner = self.raw.get("text_config")
        own = inner if isinstance(inner, dict) else self.raw
        return {k: v for k, v in self.family.get("defaults", {}).items() if k not in own}

    @property
    def hidden_size(self) -> int:
        return int(self.text["hidden_size"])

    @property
    def num_layers(self) -> int:
        return int(self.text["num_hidden_layers"])

    @property
    def vocab_size(self) -> int:
        return int(self.text["vocab_size"])

    @property
    def num_heads(self) -> int:
        return int(self.text["num_attention_heads"])

    @property
    def num_experts(self) -> int:
        return _first(self.text, _EXPERTS)

    @property
    def active_experts(self) -> int:
        return _first(self.text, _ACTIVE)

    @property
    def expert_width(self) -> int:
        """Width of one expert's MLP; 0 for a dense target."""
        if not self.num_experts:
            return 0
        return int(self.text.get("moe_intermediate_size") or self.text["intermediate_size"])

    @property
    def shared_width(self) -> int:
        """Width of the experts that see every token."""
        own = self.text.get("shared_expert_intermediate_size")
        return int(own or int(self.text.get("n_shared_experts") or 0) * self.expert_width)

    @property
    def is_mla(self) -> bool:
        return bool(self.text.get("kv_lora_rank"))

    @property
    def is_vlm(self) -> bool:
        return isinstance(self.raw.get("vision_config"), dict)

    @property
    def is_tied(self) -> bool:
        default = self.family.get("tied", False)
        inner = self.text.get("tie_word_embeddings")
        return bool(self.raw.get("tie_word_embeddings", default if inner is None else inner))

    @property
    def window(self) -> int | None:
        """Tokens that a sliding-window layer sees, where there is such a layer."""
        if self.text.get("use_sliding_window") is False:
            return None
        found = self.text.get("sliding_window")
        return int(found) if found else None

    @property
    def layer_kinds(self) -> list[str]:
        """The kind of each layer's mixer: linear attention, or any kind of attention."""
        named = self.text.get("layer_types")
        if named:
            return [str(kind) for kind in named]
        every = self.text.get("full_attention_interval")
        return [
            LINEAR if every and (layer + 1) % int(every) else "full_attention"
            for layer in range(self.num_layers)
        ]

    @property
    def unknown_kinds(self) -> list[str]:
        """Layers that cannot be counted: state spaces and the like."""
        keys = ("mamba_num_heads", "mamba_d_state", "mamba_n_heads", "hybrid_override_pattern")
        found = [key for key in keys if self.text.get(key)]
        known = {LINEAR, "full_attention", "sliding_attention", "chunked_attention"}
        return [*found, *sorted(set(self.layer_kinds) - known)]

    @property
    def is_hybrid(self) -> bool:
        return LINEAR in self.layer_kinds or bool(self.unknown_kinds)

    @property
    def kinds(self) -> list[str]:
        """What a person calls it."""
        found = ["MoE" if self.num_experts else "dense"]
        found += ["VLM"] if self.is_vlm else []
        found += ["sliding window"] if self.window else []
        found += ["MLA"] if self.is_mla else []
        found += ["hybrid"] if self.is_hybrid else []
        found += ["custom code"] if self.raw.get("auto_map") else []
        return found

    @property
    def quantization(self) -> dict[str, Any]:
        found = self.raw.get("quantization_config") or self.text.get("quantization_config")
        return found if isinstance(found, dict) else {}

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is experts."""
        if not self.num_experts or layer in (self.text.get("mlp_only_layers") or ()):
            return False
        if layer < int(self.text.get("first_k_dense_replace") or 0):
            return False
        return (layer + 1) % int(self.text.get("decoder_sparse_step") or 1) == 0


def understand(raw: object, where: str) -> Architecture:
    """The architecture of a parsed config.json.

    Raises:
        UserError: it lacks a size that every decoder has.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected a model's config.json, found {type(raw).__name__}.")
    inner = raw.get("text_config")
    text: dict[str, Any] = dict(inner) if isinstance(inner, dict) else dict(raw)
    families = read_data("families.yaml")
    kind = str(text.get("model_type", ""))
    family = families.get(kind) or {}
    text = {**family.get("defaults", {}), **text}
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if missing := [key for key in needed if not isinstance(text.get(key), int)]:
        raise UserError(
            f"{where}: expected a decoder's config.json, found no {', '.join(missing)} in it. "
            "Give the config of the whole model, as from_pretrained reads it."
        )
    if not text.get("intermediate_size") and not text.get("moe_intermediate_size"):
        raise UserError(f"{where}: expected intermediate_size, found none.")
    return Architecture(raw, text, family, kind in families)
