# SPDX-License-Identifier: Apache-2.0
"""config.json and tensor names of a draft head in the speculators library's layout, which vLLM serves too.

The file states `norm_before_residual`, since vLLM assumes true without it. The decoder's tensors are
named `layers.0.*` here and `midlayer.*` in our own layout.
"""

from collections.abc import Sequence
from typing import Any

from shared.contracts.exported_head import config_json, stated_norms, stated_window
from shared.contracts.head_config import HeadConfig

VERSION = "0.9.0"  # of the speculators library whose layout this is
_ARCHITECTURES = {"eagle3": "Eagle3Speculator", "peagle": "PEagleSpeculator"}
_LAYER_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "vocab_size",
    "tie_word_embeddings",
)


def speculators_config(
    config: HeadConfig,
    *,
    dtype: str,
    target: str,
    target_architectures: Sequence[str],
    num_draft_tokens: int,
) -> dict[str, Any]:
    """The whole config.json; the decoder layer's part is an allow-list of our own keys."""
    ours, kind = config_json(config, dtype=dtype), "eagle3"
    mask: dict[str, Any] = {}
    if config.variant.parallel:
        kind, mask = "peagle", {"mask_token_id": config.mask_token}
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "speculators_model_type": kind,
        "speculators_version": VERSION,
        "dtype": dtype,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "norm_before_residual": config.variant.norm_before_residual,
        "norm_before_fc": False,
        **stated_norms(config.variant),
        **mask,
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
        "transformer_layer_config": {
            **{key: ours[key] for key in _LAYER_KEYS},
            **stated_window(config.variant),
            # vLLM merges this part alone into what it reads. It knows P-EAGLE's norms from here only,
            # and expects three aux states without their number.
            **(stated_norms(config.variant) if mask else {}),
            "num_aux_hidden_states": len(config.aux_layers),
        },
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": num_draft_tokens}
            ],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target, "architectures": list(target_architectures)},
        },
    }


def speculators_name(name: str) -> str:
    """`midlayer.mlp.up_proj.weight` is that layout's `layers.0.mlp.up_proj.weight`."""
    return name.replace("midlayer.", "layers.0.")
