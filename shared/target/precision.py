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
    answers almost twice as fast in it. The kernels of a quantized target choose for themselves.
    """
    if dtype != "auto" or torch.cuda.is_available() or faster_dtype() != torch.float32:
        return dtype
    if any(part.get("quantization_config") for part in target.parts):
        return dtype
    logger.info("computing in float32, the faster precision here; set dtype for another")
    return "float32"
