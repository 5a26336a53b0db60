# SPDX-License-Identifier: Apache-2.0
"""Parameters of a target by part, and the bytes of its weights as they are stored.

Legend: H hidden size, V vocabulary, E experts, I an MLP's width.

Worked example, a dense layer of H = 4, one head of 4, I = 8: queries, keys, values and output
4 x 16, the MLP 3 x 4 x 8, two norms of 4: 168 parameters.
"""

import dataclasses
from typing import Any

from stages.ops.plan.architecture import LINEAR, Architecture

_FP8_BLOCK = 128 * 128  # values that share one fp32 scale
_MXFP4_BITS = 4 + 8 / 32  # 32 values share one 8-bit scale


@dataclasses.dataclass
class Parameters:
    """How many, by part. `layers` are the matrices that quantisation shrinks."""

    embeddings: int = 0
    layers: int = 0
    experts: int = 0
    small: int = 0  # norms, biases, routers
    vision: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def count(target: Architecture) -> Parameters:
    """All parameters; layers of an unknown kind count as nothing (see `unknown_kinds`)."""
    size, found = target.hidden_size, Parameters()
    found.embeddings = target.vocab_size * size * (1 if target.is_tied else 2)
    found.small = size  # the final norm
    for layer, kind in enumerate(target.layer_kinds):
        found.small += int(target.family.get("norms", 2)) * size
        _add_mixer(target, kind, found)
        _add_mlp(target, layer, found)
    if target.is_vlm:
        found.vision = _vision(target.raw["vision_config"], size)
    return found


def _add_mixer(target: Architecture, kind: str, found: Parameters) -> None:
    """Attention, latent attention or a gated delta net."""
    if kind == LINEAR:
        _add_linear(target, found)
    elif target.is_mla:
        _add_latent(target, found)
    else:
        _add_attention(target, found)


def _add_attention(target: Architecture, found: Parameters) -> None:
    text, size, heads, family = target.text, target.hidden_size, target.num_heads, target.family
    width = int(text.get("head_dim") or size // heads)
    keys = int(text.get("num_key_value_heads") or heads) * width
    queries = heads * width
    asked = queries * (2 if family.get("gated_query") else 1)
    found.layers += size * (asked + 2 * keys) + queries * size
    if text.get("attention_bias", family.get("attention_bias")):
        found.small += asked + 2 * keys + size
    elif family.get("qkv_bias"):
        found.small += asked + 2 * keys
    if family.get("qk_norm"):
        found.small += 2 * width
    if family.get("sinks"):
        found.small += heads


def _add_latent(target: Architecture, found: Parameters) -> None:
    text, size, heads = target.text, target.hidden_size, target.num_heads
    rank, rope = int(text["kv_lora_rank"]), int(text["qk_rope_head_dim"])
    plain, value = int(text["qk_nope_head_dim"]), int(text["v_head_dim"])
    asked = heads * (plain + rope)
    if query_rank := int(text.get("q_lora_rank") or 0):
        found.layers += size * query_rank + query_rank * asked
        found.small += query_rank
    else:
        found.layers += size * asked
    found.layers += size * (rank + rope) + rank * heads * (plain + value) + heads * value * size
    found.small += rank


def _add_linear(target: Architecture, found: Parameters) -> None:
    text, size = target.text, target.hidden_size
    value_heads, value_width = text["linear_num_value_heads"], text["linear_value_head_dim"]
    keys = int(text["linear_num_key_heads"]) * int(text["linear_key_head_dim"])
    values = int(value_heads) * int(value_width)
    found.layers += size * (2 * keys + 2 * values) + size * 2 * int(value_heads) + values * size
    found.small += (2 * keys + values) * int(text["linear_conv_kernel_dim"])
    found.small += 2 * int(value_heads) + int(value_width)  # decay, time step, norm


def _add_mlp(target: Architecture, layer: int, found: Parameters) -> None:
    size = target.hidden_size
    if not target.is_sparse(layer):
        found.layers += 3 * size * int(target.text["intermediate_size"])
        return
    experts, width = target.num_experts, target.expert_width
    found.experts += experts * 3 * size * width
    found.layers += 3 * size * target.shared_width
    found.small += experts * size  # the router
    if target.family.get("expert_bias"):
        found.small += experts * (2 * width + size) + experts
    if target.family.get("router_bias"):
        found.small += experts
    if target.text.get("shared_expert_intermediate_size"):
        found.small += size  # the shared expert's gate


def _vision(vision: dict[str, Any], text_size: int) -> int:
    """A vision tower and its projector; 0 where its kind is not known."""
    kind = vision.get("model_type", "")
    if kind in ("siglip_vision_model", "siglip"):
        size, width = int(vision["hidden_size"]), int(vision["intermediate_size"])
        patch = int(vision["patch_size"])
        places = (int(vision["image_size"]) // patch) ** 2
        stem = 3 * patch * patch * size + size + places * size
        layer = 4 * size + 4 * (size * size + size) + 2 * size * width + width + size
        projector = size * text_size + size
        return stem + int(vision["num_hidden_layers"]) * layer + 2 * size + projector
    if kind == "qwen2_5_vl":
        size, width = int(vision["hidden_size"]), int(vision["intermediate_size"])
        patch = int(vision["patch_size"])
        stem = 3 * int(vision.get("temporal_patch_size", 2)) * patch * patch * size
        layer = 2 * size + 3 * size * size + 3 * size + size * size + size
        layer += 3 * size * width + 2 * width + size
        merged = size * int(vision.get("spatial_merge_size", 2)) ** 2
        out = int(vision["out_hidden_size"])
        merger = size + merged * merged + merged + merged * out + out
        return stem + int(vision["depth"]) * layer + merger
    return 0


def weight_bytes(target: Architecture, found: Parameters) -> int:
    """Bytes of the weights as the checkpoint stores them: 16 bits, or as its quantisation says."""
    how = target.quantization
    method, bits = str(how.get("quant_method", "")), how.get("bits")
    wide = found.total * 2
    if method == "fp8":
        matrices = found.layers + found.experts
        scales = 4 / _FP8_BLOCK if how.get("weight_block_size") else 0
        return round(wide - matrices * (2 - 1 - scales))
    if method == "mxfp4":
        return round(wide - found.experts * (2 - _MXFP4_BITS / 8))
    if method in ("awq", "gptq") and bits:
        group = int(how.get("group_size") or 128)
        each = int(bits) / 8 + (2 + int(bits) / 8) / group  # a 16-bit scale and a zero a group
        return round(wide - (found.layers + found.experts) * (2 - each))
    if str(target.raw.get("dtype") or target.raw.get("torch_dtype")) == "float32":
        return 2 * wide
    return wide


def draft_width(target: Architecture) -> tuple[int, str]:
    """(MLP width of the draft head, why): a dense layer's, never one expert's.

    A MoE's config may have both widths; where it has the experts' alone, a head of that width would
    be far too narrow, so it gets what a token meets: the experts that it is sent to, together.
    """
    width = int(target.text.get("intermediate_size") or 0)
    if not target.num_experts:
        return width, "the target's own"
    if width and target.text.get("moe_intermediate_size"):
        return width, f"the dense width, not an expert's {target.expert_width}"
    if width >= 2 * target.hidden_size:
        return width, "an expert's, which is as wide as a dense layer's"
    together = target.active_experts * target.expert_width
    return together, (
        f"{target.active_experts} experts of {target.expert_width}, as many as see a token: the "
        "config has no dense width"
    )
