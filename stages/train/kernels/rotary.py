# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: angles as transformers and vLLM make them, and the rotation."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from shared.contracts.head_config import HeadConfig


class Rotary:
    """transformers' rotary embedding of a head's config; its tables are equal to vLLM's.

    Not a module of the head, so that `head.to(torch.bfloat16)` leaves its frequencies in float32.
    """

    def __init__(self, config: HeadConfig) -> None:
        scaling = dict(config.rope_scaling or {})
        # For the type linear vLLM divides positions, transformers frequencies: equal but for
        # rounding, which at position 40,000 is 1e-3.
        self._stretch = float(scaling["factor"]) if scaling.get("rope_type") == "linear" else 1.0
        self._embedding = LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rope_theta=config.rope_theta,
                rope_scaling=scaling if scaling and self._stretch == 1 else None,
            )
        )

    def table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each [n, 1, d], for positions [n]."""
        self._embedding.to(positions.device)
        like = torch.empty(
            0, device=positions.device, dtype=torch.promote_types(dtype, torch.float32)
        )
        cos, sin = self._embedding(like, positions[None].float() / self._stretch)
        return cos[0, :, None].to(dtype), sin[0, :, None].to(dtype)


class Rotation(torch.autograd.Function):
    """Rotate x [n, heads, d] by cos and sin [n, 1, d]: halves, not interleaved pairs.

    (low, high) becomes (low cos - high sin, high cos + low sin). A rotation's gradient is the
    rotation back, so nothing of x is kept. `apply(x, cos, sin)`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
