# SPDX-License-Identifier: Apache-2.0
"""The speculators library's config.json, made flat as vLLM makes it.

In: a config.json whose decoder layer stands in `transformer_layer_config`. Out: the keys that vLLM's
model classes see. The rule is that of `update_eagle3` and `update_peagle` in vLLM 0.32, to which a test
holds it: keys of the head's own are read outside the layer's part alone, and all else inside it alone.
"""

from collections.abc import Mapping
from typing import Any

# Read outside whatever the layer's part says, with the value that vLLM takes where they are left out.
# A null is stated, and means no. Of P-EAGLE's norms vLLM replaces these two only.
_OWN: dict[str, dict[str, Any]] = {
    "eagle3": {
        "draft_vocab_size": None,
        "norm_before_residual": True,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
    },
    "peagle": {
        "draft_vocab_size": None,
        "norm_before_residual": False,
        "norm_before_fc": False,
    },
}
_CLASSES = {
    "eagle3": {"llama": "Eagle3LlamaForCausalLM", "qwen3": "Eagle3Qwen3ForCausalLM"},
    "peagle": {"llama": "PeagleLlamaForCausalLM", "qwen3": "PeagleQwen3ForCausalLM"},
}


def flattened(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM reads of a config.json with `speculators_model_type`, which is kept beside it.

    Worked example: `norm_output: true` counts outside and not in the layer's part, `sliding_window` in
    the layer's part and not outside.

    Raises:
        ValueError: vLLM serves no EAGLE-3 head of that kind; says what was found.
    """
    kind, layer = raw["speculators_model_type"], raw.get("transformer_layer_config")
    if not isinstance(kind, str) or kind not in _OWN or not isinstance(layer, Mapping):
        raise ValueError(f"speculators_model_type {kind!r}")
    classes, model_type = _CLASSES[kind], layer.get("model_type", "llama")
    if not isinstance(model_type, str) or model_type not in classes:
        raise ValueError(f"a layer of model_type {model_type!r}")
    flat = {**layer, "speculators_model_type": kind, "architectures": [classes[model_type]]}
    flat |= {name: raw.get(name, unstated) for name, unstated in _OWN[kind].items()}
    if raw.get("target_hidden_size") is not None:
        flat["target_hidden_size"] = raw["target_hidden_size"]
    if raw.get("eagle_aux_hidden_state_layer_ids"):
        flat["eagle_aux_hidden_state_layer_ids"] = raw["eagle_aux_hidden_state_layer_ids"]
    if kind == "peagle":
        flat["pard_token"] = raw.get("mask_token_id")
    return flat
