# SPDX-License-Identifier: Apache-2.0
"""Softmax, loss, hits and gradient of a chunk of logits in one Triton kernel.

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
TINY = 1e-38  # near the smallest normal float32


@triton.jit
def _target(raw, logit_scale, softcap, CAPPED: tl.constexpr):
    logits = raw.to(tl.float32) * logit_scale
    if CAPPED:
        # c * tanh(x / c) as 2 * sigmoid(2 x) - 1, which is in every version of Triton.
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
    return logits


@triton.jit
def _rows(
    targets, scores, shares, losses, hits, num_targets, num_columns, logit_scale, softcap, factor, tiny,
    K: tl.constexpr, B: tl.constexpr, CAPPED: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """Logits targets [C, D] and scores [K, C, D], which becomes their gradient; losses, hits [K, C]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, B)
    share = tl.load(shares + row)
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
        loss = own_top + tl.log(own_total) - expected
        # The gradient is straight (q - p) + bent q (below - [q < p]), as cross_entropy.py derives it.
        straight, bent, below, accepted = 1.0, 0.0, 0.0, 0.0
        if LOSS > 0:
            for first in range(0, num_columns, B):
                inside = first + column < num_columns
                raw = tl.load(targets + row * num_columns + first + column, mask=inside, other=0.0)
                logits = _target(raw, logit_scale, softcap, CAPPED)
                score = tl.load(base + first + column, mask=inside, other=0.0).to(tl.float32)
                most = tl.where(inside, share * tl.exp(logits - top) / total, 0.0)
                own = tl.where(inside, tl.exp(score - own_top) / own_total, 0.0)
                below += tl.sum(tl.where(own < most, own, 0.0), 0)
                accepted += tl.sum(tl.minimum(own, most), 0)
            if LOSS == 1:
                floored = tl.maximum(accepted, tiny)
                straight, bent, loss = 0.0, 1.0 / floored, -tl.log(floored)
            if LOSS == 2:
                straight, bent, loss = 0.0, 1.0, 1.0 - accepted
            if LOSS == 3:
                straight = tl.exp(-factor * accepted)
                bent = 1.0 - straight
                loss = straight * loss + bent * (1.0 - accepted)
        tl.store(losses + step * num_targets + row, loss)
        tl.store(hits + step * num_targets + row, at_best >= own_top)
        for first in range(0, num_columns, B):
            inside = first + column < num_columns
            raw = tl.load(targets + row * num_columns + first + column, mask=inside, other=0.0)
            logits = _target(raw, logit_scale, softcap, CAPPED)
            score = tl.load(base + first + column, mask=inside, other=0.0).to(tl.float32)
            own = tl.exp(score - own_top) / own_total
            given = tl.exp(logits - top) / total
            gradient = own - given
            if LOSS > 0:
                is_below = tl.where(own < share * tl.exp(logits - top) / total, 1.0, 0.0)
                gradient = straight * gradient + bent * own * (below - is_below)
            tl.store(base + first + column, gradient.to(scores.dtype.element_ty), mask=inside)


def loss_rows(
    targets: Tensor,
    scores: Tensor,
    shares: Tensor,
    logit_scale: float,
    softcap: float,
    loss: int,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Losses [K, C] float32 and hits [K, C] bool; `scores` [K, C, D] becomes the gradient.

    Args:
        targets: [C, D] the target's products with lm_head, without scale and softcap.
        shares: [C] float32, the target's probability of the draft vocabulary.
        softcap: 0 for none.
        loss: index in `fused.LOSSES`.
        factor: of lk_hybrid.
    """
    num_steps, num_targets, num_columns = scores.shape
    losses = scores.new_empty(num_steps, num_targets, dtype=torch.float32)
    hits = scores.new_empty(num_steps, num_targets, dtype=torch.bool)
    # Triton's interpreter truncates to bfloat16 where torch rounds.
    own = scores.float() if triton.knobs.runtime.interpret else scores
    if num_targets:
        _rows[(num_targets,)](
            targets, own, shares, losses, hits, num_targets, num_columns, logit_scale, softcap,
            factor, TINY,
            K=num_steps, B=min(COLUMNS, triton.next_power_of_2(num_columns)), CAPPED=softcap > 0,
            LOSS=loss,
        )  # fmt: skip
    if own is not scores:
        scores.copy_(own)
    return losses, hits
