# SPDX-License-Identifier: Apache-2.0
"""The shape of a draft head, read from a target's config.json or an exported head's."""

import dataclasses
import math
from typing import Any

from shared.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The shape of a draft head. The activation is SiLU and no layer has a bias: what engines load.

    `aux_layers` are in vLLM's numbering: id i is the state entering layer i of the target.
    """

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    aux_layers: tuple[int, ...]
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        sizes = {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, int | float) and not (value > 0 and math.isfinite(value))
        }
        if sizes:
            raise UserError(f"expected the sizes of a decoder, each above 0, found {sizes}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                "the draft head needs num_attention_heads to be a multiple of num_key_value_heads, "
                f"found {self.num_attention_heads} and {self.num_key_value_heads}."
            )
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise UserError(
                f"expected a draft vocabulary of 1 to {self.vocab_size} tokens (the target's), "
                f"found {self.draft_vocab_size}. Lower run.draft_vocab_size."
            )
        if self.hidden_size != self.target_hidden_size:
            raise UserError(
                "engines share the target's embeddings with the draft head, so its hidden size "
                f"must be the target's {self.target_hidden_size}, found {self.hidden_size}."
            )

    @property
    def num_parameters(self) -> int:
        """Weights of its own: fc, the layer, norms, lm_head. The embedding is the target's."""
        size, queries = self.hidden_size, self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        fc = size * len(self.aux_layers) * self.target_hidden_size
        attention = 2 * size * (queries + 2 * keys) + queries * size
        mlp, norms = 3 * size * self.intermediate_size, 4 * size
        return fc + attention + mlp + norms + self.draft_vocab_size * size

    @classmethod
    def from_json(
        cls,
        raw: dict[str, Any],
        *,
        aux_layers: tuple[int, ...],
        draft_vocab_size: int,
        where: object = "config.json",
    ) -> "HeadConfig":
        """Shaped like the config.json in `raw`: a Llama-like target's, or an exported head's.

        Rotary parameters lie in `rope_parameters` (transformers 5) or in `rope_theta` and
        `rope_scaling` (transformers 4); both are read.

        Args:
            where: the file that `raw` is from, for the message.

        Raises:
            UserError: a size is missing or not a number.
        """
        try:
            rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
            theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
            plain = rope.get("rope_type", rope.get("type", "default")) == "default"
            heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
            return cls(
                hidden_size=hidden,
                target_hidden_size=int(raw.get("target_hidden_size") or hidden),
                intermediate_size=int(raw["intermediate_size"]),
                num_attention_heads=heads,
                num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or hidden // heads),
                vocab_size=int(raw["vocab_size"]),
                draft_vocab_size=draft_vocab_size,
                rms_norm_eps=float(raw.get("rms_norm_eps") or 1e-6),
                rope_theta=float(theta),
                rope_scaling=None if plain else rope,
                max_position_embeddings=int(raw["max_position_embeddings"]),
                aux_layers=tuple(aux_layers),
            )
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(
                f"{where}: expected the sizes of a decoder, found: {error!r}"
            ) from error
        except UserError as error:
            raise UserError(f"{where}: no draft head has this shape: {error}") from error
