# SPDX-License-Identifier: Apache-2.0
"""What tells draft heads apart: where they normalise (EAGLE-3, 3.1, a Qwen3-style layer), how far they look.

In: a head's config.json, or the names of a recipe. Out: flags that mean what they mean in vLLM's
`llama_eagle3.py` and `qwen3_eagle3.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

QWEN3_ARCHITECTURE = "Eagle3Qwen3ForCausalLM"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadVariant:
    """A head's norms beyond those that every head has, and its window; without any, classic EAGLE-3.

    Attributes:
        norm_before_fc: one RMS norm over the concatenated aux states (`input_norm`).
        fc_norm: an RMS norm for each aux state before they are concatenated (`fc_norm.{i}`).
        norm_output: the state fed to the next step is the one after the final norm.
        norm_before_residual: the layer's residual starts after `hidden_norm`, not before it.
        qk_norm: an RMS norm over each head's query and key, as in Qwen3 (`q_norm`, `k_norm`).
        window: attention sees this many positions, the current one included; None means all.
    """

    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    qk_norm: bool = False
    window: int | None = None

    @property
    def name(self) -> str:
        """`EAGLE-3.1` where the fed-back state or the aux states are normalised, else `EAGLE-3`."""
        return "EAGLE-3.1" if self.norm_before_fc or self.fc_norm or self.norm_output else "EAGLE-3"


CLASSIC = HeadVariant()
_BY_NAME = {"eagle3": CLASSIC, "eagle3.1": HeadVariant(fc_norm=True, norm_output=True)}


def named_variant(
    variant: str | None = None, layer: str | None = None, window: int | None = None
) -> HeadVariant:
    """The variant that train makes from `train.variant`, `train.layer` and `train.draft_window`."""
    base = _BY_NAME[variant or "eagle3.1"]
    return dataclasses.replace(base, qk_norm=layer == "qwen3", window=window)


def read_variant(config: Mapping[str, Any]) -> HeadVariant:
    """The variant of a head, from its config.json as vLLM reads it.

    Args:
        config: flat, as `Head.config`; in the speculators layout `norm_before_residual` is true
            unless stated.
    """
    nested = config.get("eagle_config") or {}
    is_speculators = config.get("speculators_model_type") is not None
    # vLLM serves a head that names its target's class by that name with Eagle3 before it.
    names = config.get("architectures") or []
    is_qwen3 = QWEN3_ARCHITECTURE in (*names, *(f"Eagle3{name}" for name in names))
    qk_norm = is_qwen3 or (is_speculators and config.get("model_type") == "qwen3")
    is_sliding = (config.get("layer_types") or [None])[0] == "sliding_attention"
    # transformers' Qwen3Config drops the window otherwise.
    is_sliding &= not qk_norm or bool(config.get("use_sliding_window"))
    return HeadVariant(
        norm_before_fc=bool(nested.get("norm_before_fc", config.get("norm_before_fc"))),
        fc_norm=bool(config.get("fc_norm")),
        norm_output=bool(config.get("norm_output")),
        norm_before_residual=bool(config.get("norm_before_residual", is_speculators)),
        qk_norm=qk_norm,
        window=config.get("sliding_window") if is_sliding else None,
    )
