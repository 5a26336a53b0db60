# SPDX-License-Identifier: Apache-2.0
"""What tells draft heads apart: where they normalise (EAGLE-3, 3.1, a Qwen3-style layer), how far they look,
whether one forward pass drafts all tokens (P-EAGLE).

In: a head's config.json, or the names of a recipe. Out: flags that mean what they mean in vLLM's
`llama_eagle3.py` and `qwen3_eagle3.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

QWEN3_ARCHITECTURE = "Eagle3Qwen3ForCausalLM"
_QWEN3_CLASSES = {QWEN3_ARCHITECTURE, "PeagleQwen3ForCausalLM"}
MASK_TOKEN = "pard_token"  # as every vLLM that has parallel drafting reads it
_MASK_TOKENS = ("mask_token_id", MASK_TOKEN, "ptd_token_id")  # in the order in which vLLM looks


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadVariant:
    """What a head has beyond classic EAGLE-3: norms, a window, parallel drafting.

    Attributes:
        norm_before_fc: one RMS norm over the concatenated aux states (`input_norm`).
        fc_norm: an RMS norm for each aux state before they are concatenated (`fc_norm.{i}`).
        norm_output: the state fed to the next step is the one after the final norm.
        norm_before_residual: the layer's residual starts after `hidden_norm`, not before it.
        qk_norm: an RMS norm over each head's query and key, as in Qwen3 (`q_norm`, `k_norm`).
        window: attention sees this many positions, the current one included; None means all.
        parallel: P-EAGLE: each step after the first is fed the same mask (the state `mask_hidden` and
            the embedding of a mask token), so one forward pass drafts all tokens.
    """

    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    qk_norm: bool = False
    window: int | None = None
    parallel: bool = False

    @property
    def name(self) -> str:
        """`P-EAGLE`, or `EAGLE-3.1` where the fed-back or the aux states are normalised, or `EAGLE-3`."""
        if self.parallel:
            return "P-EAGLE"
        return "EAGLE-3.1" if self.norm_before_fc or self.fc_norm or self.norm_output else "EAGLE-3"


CLASSIC = HeadVariant()
_BY_NAME = {"eagle3": CLASSIC, "eagle3.1": HeadVariant(fc_norm=True, norm_output=True)}


def named_variant(
    variant: str | None = None,
    layer: str | None = None,
    window: int | None = None,
    parallel: bool | None = None,
) -> HeadVariant:
    """The variant of `train.variant`, `train.layer`, `train.draft_window`, `train.parallel_drafting`.

    A parallel head has no norms by default, as P-EAGLE was published. It feeds no state back, so of
    EAGLE-3.1's norms it can have those of the aux states alone.
    """
    base = _BY_NAME[variant or ("eagle3" if parallel else "eagle3.1")]
    return dataclasses.replace(
        base,
        norm_output=base.norm_output and not parallel,
        qk_norm=layer == "qwen3",
        window=window,
        parallel=bool(parallel),
    )


def stated_mask_token(config: Mapping[str, Any]) -> int | None:
    """The mask token that a config.json states, as vLLM finds it."""
    found = (config.get(name) for name in _MASK_TOKENS)
    return next((int(token) for token in found if token is not None), None)


def read_variant(config: Mapping[str, Any]) -> HeadVariant:
    """The variant of a head, from its config.json as vLLM reads it.

    Args:
        config: flat, as `Head.config`.
    """
    nested = config.get("eagle_config") or {}
    # vLLM serves a head that names its target's class by that name with Eagle3 before it.
    names = config.get("architectures") or []
    served_as = {*names, *(f"Eagle3{name}" for name in names)}
    is_sliding = (config.get("layer_types") or [None])[0] == "sliding_attention"
    if config.get("model_type") == "qwen3" and "speculators_model_type" not in config:
        # transformers' Qwen3Config, which is not what vLLM reads that layout with, drops the window.
        is_sliding &= bool(config.get("use_sliding_window"))
    return HeadVariant(
        norm_before_fc=bool(nested.get("norm_before_fc", config.get("norm_before_fc"))),
        fc_norm=bool(config.get("fc_norm")),
        norm_output=bool(config.get("norm_output")),
        norm_before_residual=bool(config.get("norm_before_residual")),
        qk_norm=not served_as.isdisjoint(_QWEN3_CLASSES),
        window=config.get("sliding_window") if is_sliding else None,
        parallel=bool(config.get("parallel_drafting")),
    )
