# SPDX-License-Identifier: Apache-2.0
"""Which precision an engine computes a target in."""

import logging

import torch

from shared.runtime.processor import faster_dtype
from shared.target.model import TargetConfig

logger = logging.getLogger(__name__)


def compute_dtype(dtype: str, target: TargetConfig) -> str:
    """`dtype`, but "auto" is float32 on a machine whose CPU computes, and multiplies faster in it.

    Float32 is no less exact, at twice the memory; where bfloat16 is emulated, a pretrained target
    answers almost twice as fast in it. The kernels of a quantized target choose for themselves, and
    vLLM's linear attention on a CPU takes bfloat16 alone.
    """
    if dtype != "auto" or torch.cuda.is_available() or faster_dtype() != torch.float32:
        return dtype
    if any(part.get("quantization_config") for part in target.parts):
        return dtype
    if _has_linear_attention(target):
        logger.info("computing in bfloat16, which linear attention takes on a CPU")
        return "bfloat16"
    logger.info("computing in float32, the faster precision here; set dtype for another")
    return "float32"


def _has_linear_attention(target: TargetConfig) -> bool:
    """Qwen3-Next's kind. Transformers calls Mamba's layers linear_attention too: they have no such keys."""
    settings = target.known_settings
    kinds = settings.get("layer_types") or ()
    return "linear_key_head_dim" in settings and "linear_attention" in kinds
