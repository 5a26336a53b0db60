# SPDX-License-Identifier: Apache-2.0
"""Soft cross-entropy against the target, through lm_head, in chunks of rows.

In: the head's normed states, the target's states, what each slot weighs. Out: the weighted sum, and
each slot's own cross-entropy and hit.
Cost: one target and K draft products with lm_head for each counted slot, no [T, D] tensor: logits
live for one chunk of rows, and their gradients are taken on the spot.
The surprise: so gradients are computed in the forward pass (where grad is enabled).

Shapes: R slots that count at step 0, K TTT steps, H hidden size, D draft vocabulary, C targets of a
chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stages.train.kernels.precision import at_least_float32
from stages.train.objective.slices import even_slices
from stages.train.objective.target_output import TargetOutput

# K * C, the rows of a chunk's logits, of which two or three live at once. Fewer rows read lm_head and
# write its gradient more often, more push the logits themselves out of the cache.
CHUNK_ROWS = 768
# An accelerator has no cache for them, and wants larger products.
ACCELERATOR_CHUNK_ROWS = 2048


class SoftCrossEntropy(torch.autograd.Function):
    """sum_kr weights[k, r] * CE(softmax(hidden[k, r] @ lm_head.T), p[r + k]), in chunks of rows.

    Row r + k, because the slots of a turn are neighbours: row r at step k is scored against the
    same p as row r + 1 at step k - 1. So each p is made once for all steps, and a chunk of targets
    takes one product for all of them. Where r + k leaves the turn the slot does not count and its
    weight is 0.

    Worked example: slots [2, 3, 4] have targets p_3, p_4, p_5 (finals rows 0, 1, 2); slot 3 (row 1)
    at step 1 is scored against p_5, row 1 + 1 = 2.

    `apply(hidden [K, R, H], lm_head [D, H], weights [K, R], finals [R, H], target)` gives the loss,
    the unweighted cross-entropies [K, R] and hits [K, R] bool; a tie at the top counts as a hit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        lm_head: Tensor,
        weights: Tensor,
        finals: Tensor,
        target: TargetOutput,
    ) -> tuple[Tensor, Tensor, Tensor]:
        by_hidden, by_head = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            work = lm_head.to(hidden.dtype)
            states, scales = to_targets(hidden), to_targets(weights)
            grad_states = torch.zeros_like(states) if by_hidden else None
            # In float32 also where products are not: hundreds of chunks add up in it.
            grad_head = torch.zeros_like(work, dtype=weights.dtype) if by_head else None
            entropy, hits = torch.zeros_like(scales), torch.zeros_like(scales, dtype=torch.bool)
            for rows in _chunks(weights):
                logits = target.logits(finals[rows])
                best = logits.argmax(-1, keepdim=True)
                probabilities = logits.softmax(-1)
                # One matrix: a batch of K would have lm_head copied for each of them.
                chunk = states[:, rows].flatten(0, 1)  # [K * C, H]
                scores = at_least_float32(chunk @ work.t()).unflatten(0, (len(states), -1))
                top = scores.amax(-1)
                hits[:, rows] = (
                    scores.gather(-1, best.expand(len(scores), -1, -1)).squeeze(-1) >= top
                )
                # [C, 1, D] @ [C, D, K]: a product a row, no [K, C, D] of addends.
                expected = (probabilities[:, None] @ scores.permute(1, 2, 0)).squeeze(1).t()
                torch.softmax(scores, -1, out=scores)
                # The largest probability is exp(top - log-sum-exp).
                entropy[:, rows] = top - scores.amax(-1).log() - expected
                grad = scores.sub_(probabilities).flatten(0, 1).to(hidden.dtype)
                scale = scales[:, rows].flatten()[:, None]
                if grad_states is not None:
                    by_row = (grad @ work).mul_(scale)
                    grad_states[:, rows] = by_row.unflatten(0, (len(states), -1))
                if grad_head is not None:
                    _add_product(grad_head, grad.t(), (chunk * scale).to(grad.dtype))
        ctx.save_for_backward(None if grad_states is None else to_slots(grad_states), grad_head)
        ctx.head_dtype = lm_head.dtype
        entropy, hits = to_slots(entropy), to_slots(hits)
        ctx.mark_non_differentiable(entropy, hits)
        return (entropy * weights).sum(), entropy, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None
            if grad_head is None
            else (grad_head * grad.to(grad_head.dtype)).to(ctx.head_dtype),
            None,
            None,
            None,
        )


def to_targets(by_slot: Tensor) -> Tensor:
    """[K, R, ...] by slot to [K, R, ...] by target: step k moves k rows on; zeros come in.

    Worked example, K = 2: [[a, b, c], [d, e, f]] becomes [[a, b, c], [0, d, e]], so that a column
    is scored against one p. f has none.
    """
    by_target = torch.zeros_like(by_slot)
    for step, (into, values) in enumerate(zip(by_target, by_slot, strict=True)):
        into[step:] = values[: max(len(values) - step, 0)]
    return by_target


def to_slots(by_target: Tensor) -> Tensor:
    """The way back: [[a, b, c], [0, d, e]] becomes [[a, b, c], [d, e, 0]]."""
    by_slot = torch.zeros_like(by_target)
    for step, (into, values) in enumerate(zip(by_slot, by_target, strict=True)):
        into[: max(len(values) - step, 0)] = values[step:]
    return by_slot


def _chunks(weights: Tensor) -> Iterator[slice]:
    """Even ranges of the R targets, for logits of about as many rows as are wanted."""
    num_steps, num_rows = weights.shape
    rows = CHUNK_ROWS if weights.is_cpu else ACCELERATOR_CHUNK_ROWS
    return even_slices(0, num_rows, max(1, rows // num_steps))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, in one pass where their dtypes are one."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
