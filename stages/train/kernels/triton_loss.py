# SPDX-License-Identifier: Apache-2.0
"""Softmax, cross-entropy, hits and gradient of a chunk of logits in one Triton kernel.

A program takes one target row and its K draft rows. Rows are read in blocks of columns; logits stay
in the dtype of their product, and everything is computed in float32.

Shapes: C targets of a chunk, K TTT steps, D draft vocabulary. This file is imported only where the
kernels run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 2048  # of a block


@triton.jit
def _target(raw, logit_scale, softcap, CAPPED: tl.constexpr):
    logits = raw.to(tl.float32) * logit_scale
    if CAPPED:
        # c * tanh(x / c) as 2 * sigmoid(2 x) - 1, which is in every version of Triton.
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
    return logits


@triton.jit
def _rows(
    targets, scores, entropies, hits, num_targets, num_columns, logit_scale, softcap,
    K: tl.constexpr, B: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Logits targets [C, D] and scores [K, C, D], which becomes their gradient; entropies, hits [K, C]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, B)
    top, total, highest, best = float("-inf"), 0.0, float("-inf"), 0
    for first in range(0, num_columns, B):
        inside = first + column < num_columns
        raw = tl.load(targets + row * num_columns + first + column, mask=inside, other=0.0)
        logits = tl.where(inside, _target(raw, logit_scale, softcap, CAPPED), float("-inf"))
        # Scale and softcap keep the order, but their rounding could make a tie.
        products = tl.where(inside, raw.to(tl.float32), float("-inf"))
        block_best = tl.max(products, 0)
        best = tl.where(block_best > highest, first + tl.argmax(products, 0), best)
        highest = tl.maximum(highest, block_best)
        higher = tl.maximum(top, tl.max(logits, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher), 0)
        top = higher
    for step in range(K):
        base = scores + (step * num_targets + row) * num_columns
        at_best = tl.load(base + best).to(tl.float32)
        own_top, own_total, expected = float("-inf"), 0.0, 0.0
        for first in range(0, num_columns, B):
            inside = first + column < num_columns
            raw = tl.load(targets + row * num_columns + first + column, mask=inside, other=0.0)
            logits = tl.where(inside, _target(raw, logit_scale, softcap, CAPPED), float("-inf"))
            score = tl.load(base + first + column, mask=inside, other=0.0).to(tl.float32)
            expected += tl.sum(tl.exp(logits - top) / total * score, 0)
            score = tl.where(inside, score, float("-inf"))
            higher = tl.maximum(own_top, tl.max(score, 0))
            own_total = own_total * tl.exp(own_top - higher) + tl.sum(tl.exp(score - higher), 0)
            own_top = higher
        tl.store(entropies + step * num_targets + row, own_top + tl.log(own_total) - expected)
        tl.store(hits + step * num_targets + row, at_best >= own_top)
        for first in range(0, num_columns, B):
            inside = first + column < num_columns
            raw = tl.load(targets + row * num_columns + first + column, mask=inside, other=0.0)
            logits = _target(raw, logit_scale, softcap, CAPPED)
            score = tl.load(base + first + column, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(score - own_top) / own_total - tl.exp(logits - top) / total
            tl.store(base + first + column, gradient.to(scores.dtype.element_ty), mask=inside)


def loss_rows(
    targets: Tensor, scores: Tensor, logit_scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropies [K, C] float32 and hits [K, C] bool; `scores` [K, C, D] becomes the gradient.

    Args:
        targets: [C, D] the target's products with lm_head, without scale and softcap.
        softcap: 0 for none.
    """
    num_steps, num_targets, num_columns = scores.shape
    entropies = scores.new_empty(num_steps, num_targets, dtype=torch.float32)
    hits = scores.new_empty(num_steps, num_targets, dtype=torch.bool)
    # Triton's interpreter truncates to bfloat16 where torch rounds.
    own = scores.float() if triton.knobs.runtime.interpret else scores
    if num_targets:
        _rows[(num_targets,)](
            targets, own, entropies, hits, num_targets, num_columns, logit_scale, softcap,
            K=num_steps, B=min(COLUMNS, triton.next_power_of_2(num_columns)), CAPPED=softcap > 0,
        )  # fmt: skip
    if own is not scores:
        scores.copy_(own)
    return entropies, hits
