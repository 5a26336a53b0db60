# SPDX-License-Identifier: Apache-2.0
"""What lies in `export/`: the exact config.json and tensors that engines load, and their check.

In: a head's shape, or the folder of an exported head. Out: what must be there, or the name of what is
not as agreed. Costs one reading of the head's weights. Heads of other makers are `head_folder`'s.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.contracts.head_config import HeadConfig
from shared.contracts.head_folder import MASK_HIDDEN, read_head
from shared.contracts.head_variant import (
    MASK_TOKEN,
    QWEN3_ARCHITECTURE,
    HeadVariant,
    read_variant,
)
from shared.contracts.layers import to_output_ids
from shared.errors import FOREIGN_ERRORS, OutputError, UserError
from shared.io.files import require_file

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ARCHITECTURE = "LlamaForCausalLMEagle3"


def config_json(config: HeadConfig, *, dtype: str) -> dict[str, Any]:
    """The whole config.json: an allow-list, no null.

    Rotary parameters are written twice: `rope_theta` and `rope_scaling` for transformers 4,
    `rope_parameters` for transformers 5.
    """
    variant, scaling = config.variant, dict(config.rope_scaling or {})
    rope_type = scaling.pop("type", None) or "default"  # the older spelling
    rope = {"rope_type": rope_type, **scaling}
    fields: dict[str, Any] = {
        "architectures": [QWEN3_ARCHITECTURE if variant.qk_norm else ARCHITECTURE],
        "model_type": "qwen3" if variant.qk_norm else "llama",
        "torch_dtype": dtype,
        "num_hidden_layers": 1,
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.target_hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "tie_word_embeddings": False,
        "norm_before_residual": variant.norm_before_residual,
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": to_output_ids(config.aux_layers),
            "use_aux_hidden_state": True,
        },
    }
    if scaling:
        fields["rope_scaling"] = rope
    if variant.parallel:  # vLLM itself is told by its `speculative_config`
        fields |= {"parallel_drafting": True, MASK_TOKEN: config.mask_token}
    return fields | stated_norms(variant) | stated_window(variant)


def stated_norms(variant: HeadVariant) -> dict[str, bool]:
    """The norms of config.json that a head without them does not state."""
    norms = {name: getattr(variant, name) for name in ("norm_before_fc", "fc_norm", "norm_output")}
    return {name: True for name, is_set in norms.items() if is_set}


def stated_window(variant: HeadVariant) -> dict[str, Any]:
    """The keys of a layer with a window; transformers' Qwen3Config drops it without the last one."""
    if variant.window is None:
        return {}
    keys = {"layer_types": ["sliding_attention"], "sliding_window": variant.window}
    return keys | ({"use_sliding_window": True} if variant.qk_norm else {})


def expected_tensors(config: HeadConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of model.safetensors and its shape; d2t and t2d only where D < V."""
    size, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (size, len(config.aux_layers) * config.target_hidden_size),
        "midlayer.input_layernorm.weight": (size,),
        "midlayer.hidden_norm.weight": (size,),
        "midlayer.post_attention_layernorm.weight": (size,),
        "midlayer.self_attn.q_proj.weight": (queries, 2 * size),
        "midlayer.self_attn.k_proj.weight": (keys, 2 * size),
        "midlayer.self_attn.v_proj.weight": (keys, 2 * size),
        "midlayer.self_attn.o_proj.weight": (size, queries),
        "midlayer.mlp.gate_proj.weight": (inner, size),
        "midlayer.mlp.up_proj.weight": (inner, size),
        "midlayer.mlp.down_proj.weight": (size, inner),
        "norm.weight": (size,),
        "lm_head.weight": (config.draft_vocab_size, size),
    }
    variant, num_inputs = config.variant, len(config.aux_layers)
    if variant.norm_before_fc:
        shapes["input_norm.weight"] = (num_inputs * config.target_hidden_size,)
    if variant.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (config.target_hidden_size,) for i in range(num_inputs)}
    if variant.parallel:
        shapes[MASK_HIDDEN] = (1, num_inputs * config.target_hidden_size)
    if variant.qk_norm:
        for name in ("q_norm", "k_norm"):
            shapes[f"midlayer.self_attn.{name}.weight"] = (config.head_dim,)
    if config.draft_vocab_size < config.vocab_size:
        shapes |= {"d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
    return shapes


def check_export(folder: Path) -> HeadConfig:
    """Read an exported folder of ours back; its config, if engines can serve it.

    Raises:
        OutputError: a key, a tensor, a shape, a dtype or a value is not as agreed.
    """
    try:
        require_file(folder / "model.safetensors")
        head = read_head(folder)
        raw = head.config
        config = HeadConfig.from_json(
            raw,
            aux_layers=tuple(raw["eagle_aux_hidden_state_layer_ids"]),
            draft_vocab_size=raw["draft_vocab_size"],
            variant=read_variant(raw),
            where=folder / "config.json",
        )
        dtype = DTYPES[raw["torch_dtype"]]
        expected = config_json(config, dtype=raw["torch_dtype"])
        weights = head.tensors()
    except (UserError, *FOREIGN_ERRORS) as error:
        raise _not_as_agreed(
            folder, f"expected an exported draft head, found: {error!r}"
        ) from error
    wrong = [
        # A null is not the same as no key: engines that read with a default take the null.
        f"expected {key} = {expected.get(key, 'no such key')!r}, found {raw.get(key, 'no such key')!r}"
        for key in sorted(expected.keys() | raw.keys())
        if raw.get(key, "no such key") != expected.get(key, "no such key")
    ]
    if wrong:
        raise _not_as_agreed(folder / "config.json", "; ".join(wrong))
    if wrong := _wrong_tensors(config, weights, dtype):
        raise _not_as_agreed(folder / "model.safetensors", "; ".join(wrong))
    return config


def _not_as_agreed(path: Path, problem: str) -> OutputError:
    return OutputError(
        f"{path}: {problem}.",
        code="export-not-as-agreed",
        remedy="Export again.",
        facts={"path": str(path)},
    )


def _wrong_tensors(config: HeadConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    dtypes = {"d2t": torch.int64, "t2d": torch.bool}
    expected = {
        name: (shape, dtypes.get(name, dtype)) for name, shape in expected_tensors(config).items()
    }
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    wrong = [
        f"{name}: expected {expected.get(name, 'no such tensor')}, found {found.get(name, 'none')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    wrong += [
        f"{name}: holds NaN or infinity"
        for name in sorted(found)
        if not weights[name].isfinite().all()
    ]
    if not wrong and "d2t" in weights:
        ids = weights["d2t"] + torch.arange(config.draft_vocab_size)
        if not torch.equal(ids, weights["t2d"].nonzero().flatten()):
            wrong.append("d2t: draft_id + d2t[draft_id] must be the ascending ids that t2d marks")
    return wrong
