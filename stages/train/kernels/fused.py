# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as torch operators, and where they run.

They run on CUDA and ROCm. A CPU, or EYRIE_TRAIN_KERNELS=torch, takes the plain versions in
`kernels/attention.py` and `objective/cross_entropy.py`. As operators they have shapes on meta
tensors too, so a test can count a step's launches without a card.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared.errors import UserError
from shared.runtime import compiler

KERNELS_VARIABLE = "EYRIE_TRAIN_KERNELS"
# What they are: objective/cross_entropy.py.
LOSSES = ("cross_entropy", "lk", "tv", "lk_hybrid")
HYBRID_FACTOR = 3.0


def is_fused(x: Tensor) -> bool:
    """Whether the Triton kernels compute on the device of `x`."""
    return (x.is_cuda or x.is_meta) and os.environ.get(KERNELS_VARIABLE) != "torch"


def require_compiler(device: torch.device) -> None:
    """Refuse a device whose kernels could not be compiled, before any time is spent on it.

    Raises:
        UserError: a C compiler or Python's headers are missing.
    """
    missing = compiler.lacking(compiler.include_folder())
    if missing and is_fused(torch.empty(0, device=device)):
        raise UserError(
            f"training on a GPU compiles Triton kernels: expected a C compiler and Python's headers, found "
            f"{missing}.",
            code="kernels-need-compiler",
            remedy=f"{compiler.REMEDY}, or set {KERNELS_VARIABLE}=torch, which is slower.",
            facts={"missing": missing},
        )


@torch.library.custom_op("eyrie::attention", mutates_args=())
def attention(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Output [R, Hq, d] and log-sum-exp [R, Hq], both float32.

    `inputs` are query, key, value, chain keys and values [k, R, Hkv, d], slots and starts int32 [R].
    """
    from stages.train.kernels import triton_attention

    return triton_attention.forward(*inputs)


@attention.register_fake
def _(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    query, kind = inputs[0], torch.float32
    return torch.empty_like(query, dtype=kind), query.new_empty(query.shape[:2], dtype=kind)


@torch.library.custom_op("eyrie::attention_backward", mutates_args=())
def attention_backward(
    inputs: Sequence[Tensor], out: Tensor, lse: Tensor, grad: Tensor
) -> list[Tensor]:
    """Gradients of query, key, value, chain keys and chain values."""
    from stages.train.kernels import triton_attention

    return triton_attention.backward(inputs, out, lse, grad)


@attention_backward.register_fake
def _(inputs: Sequence[Tensor], *_: Tensor) -> list[Tensor]:
    return [torch.empty_like(x) for x in inputs[:5]]


@torch.library.custom_op("eyrie::loss_rows", mutates_args=("scores",))
def loss_rows(
    targets: Tensor, scores: Tensor, shares: Tensor, logit_scale: float, softcap: float, loss: str
) -> tuple[Tensor, Tensor]:
    """Losses and hits [K, C]; `scores` [K, C, D] becomes the gradient of the logits."""
    from stages.train.kernels import triton_loss

    return triton_loss.loss_rows(
        targets, scores, shares, logit_scale, softcap, LOSSES.index(loss), HYBRID_FACTOR
    )


@loss_rows.register_fake
def _(targets: Tensor, scores: Tensor, *_: Any) -> Any:
    shape = scores.shape[:2]
    return scores.new_empty(shape, dtype=torch.float32), scores.new_empty(shape, dtype=torch.bool)


class FusedChainAttention(torch.autograd.Function):
    """`ChainAttention` by kernels.

    `apply(query, key, value, slots, starts, key_1, value_1, ...)` with query [R, Hq, d], key and value
    [T, Hkv, d], slots and the starts of their documents int32 [R], chain members [R, Hkv, d] gives
    [R, Hq, d].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        starts: Tensor,
        *chain: Tensor,
    ) -> Tensor:
        main = tuple(x.contiguous() for x in (query, key, value))
        members = (_stacked(chain[::2], key, len(query)), _stacked(chain[1::2], key, len(query)))
        inputs = (*main, *members, slots, starts)
        out, lse = attention(inputs)
        ctx.save_for_backward(*inputs, out, lse)
        return out.to(query.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        *main, by_key, by_value = attention_backward(inputs, out, lse, grad.contiguous())
        pairs = zip(by_key.unbind(0), by_value.unbind(0), strict=True)
        return *main, None, None, *(member for pair in pairs for member in pair)


def _stacked(members: Sequence[Tensor], key: Tensor, num_rows: int) -> Tensor:
    """[k, R, Hkv, d]."""
    return torch.stack(list(members)) if members else key.new_empty(0, num_rows, *key.shape[1:])
