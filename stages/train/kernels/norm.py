# SPDX-License-Identifier: Apache-2.0
"""RMS norm, with as few passes over memory as the device allows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.train.kernels.precision import at_least_float32


class RMSNorm(nn.RMSNorm):
    """torch's RMS norm; on a CPU a version with fewer passes, in mixed precision too."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu:
            normed: Tensor = RMSNormOnCPU.apply(x, self.weight, self.eps)
            return normed
        # The weight in the input's dtype: only then is torch's kernel fused in mixed precision.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class RMSNormOnCPU(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps), computed in float32 or wider.

    torch has one kernel for it on a GPU, but a dozen operations on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        precise = at_least_float32(x)
        with torch.autocast("cpu", enabled=False):  # which would sum the squares in bfloat16
            squares = torch.linalg.vecdot(precise, precise)
        scale = (squares / x.shape[-1] + eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, scale)
        return (precise * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, grad = x * scale, grad.to(scale.dtype)
        by_weight = (grad * normed).flatten(0, -2).sum(0)
        if not ctx.needs_input_grad[0]:  # the embeddings and the target's states
            return None, by_weight.to(weight.dtype), None
        by_normed = grad * weight
        along = torch.linalg.vecdot(by_normed, normed)[..., None] / x.shape[-1]
        by_input = by_normed.addcmul_(normed, along, value=-1).mul_(scale)
        return by_input.to(x.dtype), by_weight.to(weight.dtype), None
