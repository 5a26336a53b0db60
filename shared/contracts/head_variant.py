# SPDX-License-Identifier: Apache-2.0
"""Where a draft head normalises: what tells classic EAGLE-3 from EAGLE-3.1 and from a Qwen3-style layer.

In: a head's config.json, or the names of a recipe. Out: flags that mean what they mean in vLLM's
`llama_eagle3.py` and `qwen3_eagle3.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

QWEN3_ARCHITECTURE = "Eagle3Qwen3ForCausalLM"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadVariant:
    """The norms of a head beyond those that every head has; without any it is classic EAGLE-3.

    Attributes:
        norm_before_fc: one RMS norm over the concatenated aux states (`input_norm`).
        fc_norm: an RMS norm for each aux state before they are concatenated (`fc_norm.{i}`).
        norm_output: the state fed to the next step is the one after the final norm.
        norm_before_residual: the layer's residual starts after `hidden_norm`, not before it.
        qk_norm: an RMS norm over each head's query and key, as in Qwen3 (`q_norm`, `k_norm`).
    """

    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    qk_norm: bool = False

    @property
    def name(self) -> str:
        """`EAGLE-3.1` where the fed-back state or the aux states are normalised, else `EAGLE-3`."""
        return "EAGLE-3.1" if self.norm_before_fc or self.fc_norm or self.norm_output else "EAGLE-3"


CLASSIC = HeadVariant()
_BY_NAME = {"eagle3": CLASSIC, "eagle3.1": HeadVariant(fc_norm=True, norm_output=True)}


def named_variant(variant: str | None, layer: str | None) -> HeadVariant:
    """The variant that train makes from `train.variant` and `train.layer`."""
    return dataclasses.replace(_BY_NAME[variant or "eagle3"], qk_norm=layer == "qwen3")


def read_variant(config: Mapping[str, Any]) -> HeadVariant:
    """The variant of a head, from its config.json as vLLM reads it.

    Args:
        config: flat, as `Head.config`; in the speculators layout `norm_before_residual` is true
            unless stated.
    """
    nested = config.get("eagle_config") or {}
    is_speculators = config.get("speculators_model_type") is not None
    is_qwen3 = QWEN3_ARCHITECTURE in (config.get("architectures") or [])
    return HeadVariant(
        norm_before_fc=bool(nested.get("norm_before_fc", config.get("norm_before_fc"))),
        fc_norm=bool(config.get("fc_norm")),
        norm_output=bool(config.get("norm_output")),
        norm_before_residual=bool(config.get("norm_before_residual", is_speculators)),
        qk_norm=is_qwen3 or (is_speculators and config.get("model_type") == "qwen3"),
    )
