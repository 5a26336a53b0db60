# SPDX-License-Identifier: Apache-2.0
"""Tiny targets of many families, made from transformers' classes with random weights.

Every norm has weights and biases away from their neutral values and an eps that shows, every logit
rule a factor that shows, so that a rule which is left out changes the logits by more than rounding.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

NUM_LAYERS = 8
_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the least that vLLM's attention on a CPU takes
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon"), 0.01),
}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
# Where the engine computes in bfloat16, no expert's choice hangs on a rounding: all are taken.
_ALL_EXPERTS = _EXPERTS | {"num_experts_per_tok": 4}
_CHOSEN = _EXPERTS | {"num_experts_per_tok": 1, "intermediate_size_mlp": 96}
_LAYERWISE = {
    "final_logit_softcapping": 3.0,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 512,
    "global_head_dim": 64,
}
_CORRECTED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # as published with these
_LATENT = {
    "rms_norm_eps": 1e-6,  # their inner norms know no other, whatever config.json says
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,  # which is the head_dim of config.json, and of the draft head
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
_INDEXED = {"index_topk": 128, "index_head_dim": 64, "index_n_heads": 2}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,  # as published: vLLM's kernel on a CPU takes few others
    "linear_value_head_dim": 128,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "image_size": 28,
    "patch_size": 14,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 128,
}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}


@dataclasses.dataclass(frozen=True)
class Family:
    """What to make a family's tiny target from.

    Attributes:
        settings: of its text part, beside the common sizes.
        text_type: of the text part of a vision model; empty for a text model, or for the family's own.
        is_vision: whether it has a vision part.
    """

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    text_type: str = ""
    is_vision: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "ministral3": Family(),
    "qwen2": Family({"tie_word_embeddings": True}),
    "qwen3": Family(),
    "qwen3_moe": Family(_EXPERTS),
    "qwen3_next": Family(_ALL_EXPERTS | _LINEAR),
    "qwen3_5_text": Family(_LINEAR),
    "qwen3_5_moe_text": Family(_ALL_EXPERTS | _LINEAR),
    "gemma": Family(),
    "gemma2": Family({"final_logit_softcapping": 3.0}),
    "gemma3_text": Family(),
    "phi3": Family(),
    "glm4": Family(),
    "glm4_moe": Family(_EXPERTS | {"first_k_dense_replace": 1}),
    "cohere": Family({"logit_scale": 0.25}),
    "cohere2": Family({"logit_scale": 0.25}),
    "olmo": Family(),
    "olmo2": Family(),
    "granite": Family({"logits_scaling": 4.0}),
    "mixtral": Family({"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": Family(_EXPERTS | _LATENT | _CORRECTED | {"first_k_dense_replace": 1}),
    "gpt_oss": Family(_EXPERTS | {"rms_norm_eps": 1e-5}),  # vLLM knows no other
    "starcoder2": Family({"norm_epsilon": 0.01}),
    "stablelm": Family(),
    "smollm3": Family(),
    "nemotron": Family(),
    "ernie4_5": Family(),
    "exaone4": Family(),
    "seed_oss": Family(),
    "minicpm3": Family(_LATENT | {"dim_model_base": 16}),
    "minimax_m2": Family(
        _EXPERTS | {"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True}
    ),
    "lfm2": Family({"layer_types": ["conv", "full_attention"] * (NUM_LAYERS // 2)}),
    "nanochat": Family({"final_logit_softcapping": 3.0}),
    "falcon": Family(),
    "gpt2": Family({"n_embd": 128, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 256}),
    "opt": Family({"ffn_dim": 96, "word_embed_proj_dim": 128}),
    "mpt": Family({"d_model": 128, "n_heads": 4, "n_layers": NUM_LAYERS, "max_seq_len": 256}),
    "gpt_neox": Family({"num_key_value_heads": 4}),
    "phi": Family(),
    "afmoe": Family(
        _EXPERTS
        | {
            "num_shared_experts": 1,
            "mup_enabled": True,
            "score_func": "sigmoid",
            "route_norm": True,
        }
    ),
    "apertus": Family(),
    "arcee": Family(),
    "cohere2_moe": Family(_EXPERTS | {"num_shared_experts": 1, "logit_scale": 0.25}),
    "deepseek_v2": Family(_EXPERTS | _LATENT | {"first_k_dense_replace": 1}),
    "deepseek_v32": Family(
        _EXPERTS | _LATENT | _CORRECTED | _INDEXED | {"first_k_dense_replace": 1}
    ),
    "gemma4_text": Family(_LAYERWISE),
    "glm_moe_dsa": Family(
        _EXPERTS | _LATENT | _CORRECTED | _INDEXED | {"first_k_dense_replace": 1}
    ),
    "granite_swa": Family({"logits_scaling": 4.0, "sliding_window": 16}),
    "kimi_linear": Family(
        _EXPERTS | _LATENT | {"q_lora_rank": None, "linear_head_dim": 32, "linear_num_heads": 4}
    ),
    "laguna": Family(_EXPERTS | {"shared_expert_intermediate_size": 32}),
    "llama4_text": Family(_CHOSEN),
    "mimo_v2_flash": Family(
        _EXPERTS
        | {
            "v_head_dim": 32,
            # vLLM reads these, as they are published; the class has others of its own.
            "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0, 1, 1],
            "moe_layer_freq": [0] + [1] * (NUM_LAYERS - 1),
            "layernorm_epsilon": 0.01,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 32,
            "swa_v_head_dim": 32,
            "sliding_window_size": 128,
            "add_swa_attention_sink_bias": True,
            "rope_theta": 5e6,
            "swa_rope_theta": 1e4,
            "partial_rotary_factor": 0.334,
        }
    ),
    "nemotron_h": Family(
        {
            "layers_block_type": ["mamba", "mlp", "attention", "mlp"] * (NUM_LAYERS // 4),
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 2,
        }
    ),
    "qwen2_vl": Family({"rope_parameters": _SECTIONS}, is_vision=True),
    "qwen2_5_vl": Family({"rope_parameters": _SECTIONS}, is_vision=True),
    "qwen3_vl": Family({"rope_parameters": _SECTIONS}, is_vision=True),
    "qwen3_vl_moe": Family(_EXPERTS | {"rope_parameters": _SECTIONS}, is_vision=True),
    "qwen3_5": Family(_LINEAR, is_vision=True),
    "qwen3_5_moe": Family(_ALL_EXPERTS | _LINEAR, is_vision=True),
    "gemma3": Family(is_vision=True),
    "gemma4": Family(_LAYERWISE, is_vision=True),
    "llama4": Family(_CHOSEN, is_vision=True),
    "llava": Family(text_type="llama", is_vision=True),
    "internvl": Family({"tie_word_embeddings": False}, text_type="qwen2", is_vision=True),
    "mistral3": Family(text_type="mistral", is_vision=True),
}


def make(name: str, folder: Path, *, seed: int = 0) -> PreTrainedModel:
    """The tiny target of a family in float32, saved in `folder` without a tokenizer."""
    config = make_config(name)
    auto = AutoModelForImageTextToText if FAMILIES[name].is_vision else AutoModelForCausalLM
    generator = torch.Generator().manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    model.save_pretrained(folder)
    return model


def load(name: str, folder: Path) -> PreTrainedModel:
    """The target that `make` saved, in float32."""
    auto = AutoModelForImageTextToText if FAMILIES[name].is_vision else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def make_config(name: str) -> Any:
    """The config of a family's tiny target."""
    family = FAMILIES[name]
    text = _SIZES | family.settings
    if name == "falcon":
        del text["head_dim"]  # this class computes it
    if not family.is_vision:
        return CONFIG_MAPPING[name](**text)
    vision = dict(_VISION)
    if name == "internvl":
        vision |= {"image_size": [28, 28], "patch_size": [14, 14]}
    if family.text_type:
        text["model_type"] = family.text_type
    tied = {k: v for k, v in family.settings.items() if k == "tie_word_embeddings"}
    return CONFIG_MAPPING[name](text_config=text, vision_config=vision, **tied)
