# SPDX-License-Identifier: Apache-2.0
"""Parameters of a target and bytes of its weights: read from its tensors, counted, or unknown.

The tensors' own dtypes and shapes are the truth, quantised or not. Without them the target's class in
transformers is built on the meta device and counted, which gives the bytes too where every value has
the same width, or its quantisation says exactly which values have another.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from shared.errors import UserError
from shared.io.safetensors_files import TensorInfo, tensor_bytes
from stages.ops.plan.architecture import Architecture

_FP8_BYTES = 1 + 4 / 128**2  # 128 x 128 values share one fp32 scale
_MXFP4_BYTES = (4 + 8 / 32) / 8  # 32 values share one 8-bit scale
_UNKNOWN = "unknown: give a folder or a hub id with its safetensors files"


@dataclasses.dataclass(frozen=True)
class Weights:
    """How large a target is; None where nothing says it.

    Attributes:
        source: where the numbers are from, in words.
    """

    parameters: int | None
    bytes: int | None
    source: str


def weigh(target: Architecture, tensors: Mapping[str, TensorInfo] | None) -> Weights:
    """The size of a target.

    Args:
        tensors: of its files; None where only its config.json is there.

    Raises:
        UserError: its quantisation keeps modules that it does not list.
    """
    counted = _class_parameters(target)
    total = None if counted is None else sum(map(math.prod, counted.values()))
    if tensors:
        num_bytes = sum(map(tensor_bytes, tensors.values()))
        # Quantised values are packed, several into one element.
        if not target.quantization:
            total = sum(math.prod(tensor["shape"]) for tensor in tensors.values())
        return Weights(total, num_bytes, "safetensors headers")
    if counted is None or total is None:
        return Weights(None, None, _UNKNOWN)
    size = _counted_bytes(target, counted)
    source = "counted from config.json by its class in transformers"
    if size is None:
        return Weights(total, None, f"{source}; bytes {_UNKNOWN}")
    return Weights(total, size, source)


def _class_parameters(target: Architecture) -> dict[str, tuple[int, ...]] | None:
    """Shape of each stored tensor by name, tied ones once; None where no class knows the target."""
    from shared.target import classes, probe

    try:
        config = classes.class_config(target.target)
        model = probe.build(classes.model_class(target.target, config), config)
    except (UserError, *probe.CLASS_ERRORS):
        return None
    stored = model.state_dict().keys()
    named = [*model.named_parameters(), *((k, v) for k, v in model.named_buffers() if k in stored)]
    return {name: tuple(value.shape) for name, value in named}


def _counted_bytes(target: Architecture, counted: dict[str, tuple[int, ...]]) -> int | None:
    how = target.quantization
    method = str(how.get("quant_method", "")) if how else "none"
    parts: list[dict[str, Any]] = target.target.parts
    dtypes = [part.get("dtype") or part.get("torch_dtype") for part in parts]
    wide = 4 if next(filter(None, dtypes), "bfloat16") == "float32" else 2
    is_block = method == "fp8" and how.get("weight_block_size") == [128, 128]
    if method not in ("none", "mxfp4") and not is_block:
        return None
    listed = how.get("modules_to_not_convert") or []
    if not isinstance(listed, list):
        raise target.refused("modules_to_not_convert", "a list", listed)
    skipped = [str(name) for name in listed]
    total = 0.0
    for name, shape in counted.items():
        each: float = wide
        is_matrix = len(shape) > 1 and ".layers." in f".{name}"
        is_kept = any(part in name for part in skipped) or name.endswith((".gate.weight", "_bias"))
        if is_block and is_matrix and not is_kept:
            each = _FP8_BYTES
        elif method == "mxfp4" and is_matrix and ".experts." in name and not name.endswith("_bias"):
            each = _MXFP4_BYTES
        total += each * math.prod(shape)
    return round(total)


def draft_width(target: Architecture) -> tuple[int, str]:
    """(MLP width of the draft head, why): a dense layer's, never one expert's.

    A MoE's config may have both widths; where it has the experts' alone, a head of that width would
    be far too narrow, so it gets what a token meets: the experts that it is sent to, together.
    """
    width = target.size("intermediate_size", by_layer=True)
    if not target.num_experts:
        return width, "the target's own"
    if width and target.target.raw.get("moe_intermediate_size"):
        return width, f"the dense width, not an expert's {target.expert_width}"
    if width >= 2 * target.target.hidden_size:
        return width, "an expert's, which is as wide as a dense layer's"
    together = target.active_experts * target.expert_width
    return together, (
        f"{target.active_experts} experts of {target.expert_width}, as many as see a token: the "
        "config has no dense width"
    )
