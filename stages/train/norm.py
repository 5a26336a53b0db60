# SPDX-License-Identifier: Apache-2.0
"""RMS norm, in as few passes over memory as the device allows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight in the input's dtype: in mixed precision only that is fused."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and x.dtype == self.weight.dtype:
            normed: Tensor = RMSNormOnCPU.apply(x, self.weight, self.eps)
            return normed
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class RMSNormOnCPU(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps); torch has one kernel for it on a GPU, on a CPU a dozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (torch.linalg.vecdot(x, x) / x.shape[-1] + eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        by_weight = (grad * normed).flatten(0, -2).sum(0)
        by_normed = grad * weight
        along = torch.linalg.vecdot(by_normed, normed)[..., None] / x.shape[-1]
        return by_normed.addcmul_(normed, along, value=-1).mul_(scale), by_weight, None
