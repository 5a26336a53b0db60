# SPDX-License-Identifier: Apache-2.0
"""A trained draft head in the layout of the speculators library, which vLLM serves too.

In: a head. Out: a folder with `config.json`, `model.safetensors` and a model card, complete before it
gets its final name. The file states `norm_before_residual`, since vLLM assumes true without it. The
decoder's tensors are named `layers.0.*` here and `midlayer.*` in our own layout.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.contracts.exported_head import DTYPES, config_json, stated_norms, stated_window
from shared.contracts.head_config import HeadConfig
from shared.io.files import atomic_folder, write_json, write_text
from stages.train.export.hf import model_card, write_weights
from stages.train.model import DraftHead

VERSION = "0.9.0"  # of the speculators library whose layout this is
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
    ours = config_json(config, dtype=dtype)
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": VERSION,
        "dtype": dtype,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "norm_before_residual": config.variant.norm_before_residual,
        "norm_before_fc": False,
        **stated_norms(config.variant),
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
        "transformer_layer_config": {
            **{key: ours[key] for key in _LAYER_KEYS},
            **stated_window(config.variant),
            # vLLM merges this part alone into what it reads, and expects three without it.
            "num_aux_hidden_states": len(config.aux_layers),
        },
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": num_draft_tokens}
            ],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target, "architectures": list(target_architectures)},
        },
    }


def export_speculators(
    head: DraftHead,
    out: Path,
    *,
    target: str,
    target_architectures: Sequence[str],
    provenance: Mapping[str, Any],
    dtype: str = "bfloat16",
    num_draft_tokens: int = 3,
    template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write the head to the folder `out`, replacing what stood there.

    Args:
        target: name or path of the target.
        target_architectures: of its config.json.
        provenance: how the head was made, JSON values for the card.
        dtype: of the weights, `bfloat16` or `float32`.
        num_draft_tokens: default K of the engines.
        template_kwargs: the chat template's switches that the head was trained with.
    """
    weights = {
        name.replace("midlayer.", "layers.0."): tensor.detach()
        .to("cpu", DTYPES[dtype] if tensor.is_floating_point() else None)
        .contiguous()
        for name, tensor in head.state_dict().items()
    }
    config = speculators_config(
        head.config,
        dtype=dtype,
        target=target,
        target_architectures=target_architectures,
        num_draft_tokens=num_draft_tokens,
    )
    card = model_card(
        head.config,
        target=target,
        provenance=provenance,
        name=out.name,
        num_draft_tokens=num_draft_tokens,
        template_kwargs=template_kwargs or {},
    )
    with atomic_folder(out) as folder:
        write_json(folder / "config.json", config)
        write_weights(weights, folder / "model.safetensors")
        write_text(folder / "README.md", card)
