# SPDX-License-Identifier: Apache-2.0
"""The loss of each slot against the target, through lm_head, in chunks of rows.

In: the head's normed states, the target's states, a weight per slot. Out: the weighted sum, and each
slot's loss and hit. Cost: one target and K draft products with lm_head for each counted
slot, but no [T, D] tensor: logits live for one chunk of rows. Gradients are taken with them, in the
forward pass.

With p the target's and q the head's probabilities over the draft vocabulary, both renormalised to it, and s
the target's probability of all its tokens, a = sum_v min(s p_v, q_v) is the chance that a token sampled
at temperature 1 is accepted: what the target has outside is never accepted. The losses:

    cross_entropy  H = -sum_v p_v log q_v
    lk             -log a
    tv             1 - a, the total variation distance
    lk_hybrid      m H + (1 - m) (1 - a), m = exp(-3 a) a constant: H while little is accepted

lk and lk_hybrid are those of "LK Losses" (arXiv 2602.23881), 3 is their factor. The gradient of 1 - a
for logit j is q_j (A - b_j), where b_j says whether q_j < s p_j, and A sums q over those.

Worked example, s = 1, p = [0.5, 0.3, 0.2], q = [0.2, 0.2, 0.6]: a = 0.2 + 0.2 + 0.2 = 0.6, lk 0.511, tv 0.4;
A = 0.4, so the gradient of tv is [0.2 (0.4 - 1), 0.2 (0.4 - 1), 0.6 * 0.4] = [-0.12, -0.12, 0.24].

Shapes: R slots that count at step 0, K TTT steps, H hidden size, D draft vocabulary, C targets of a
chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stages.train.kernels.fused import HYBRID_FACTOR, LOSSES, is_fused, loss_rows
from stages.train.kernels.precision import at_least_float32, without_autocast
from stages.train.objective.slices import even_slices
from stages.train.objective.target_output import TargetOutput

# K * C, the rows of a chunk's logits. With fewer rows, lm_head is read and its gradient written more
# often; with more rows, the logits leave the cache.
CHUNK_ROWS = 768
# An accelerator has no such cache, and each chunk moves the whole gradient of lm_head.
ACCELERATOR_CHUNK_ROWS = 8192


class SlotLosses(torch.autograd.Function):
    """sum_kr weights[k, r] * loss(softmax(hidden[k, r] @ lm_head.T), p[r + k]), in chunks of rows.

    It is row r + k because the slots of a turn are neighbours: row r at step k is scored against the
    same p as row r + 1 at step k - 1. So each p is computed once for all steps, and a chunk of
    targets takes one product. If r + k leaves the turn, the slot does not count: its weight is 0.

    Worked example: slots [2, 3, 4] have targets p_3, p_4, p_5 (finals rows 0, 1, 2); slot 3 (row 1)
    at step 1 is scored against p_5, row 1 + 1 = 2.

    `apply(hidden [K, R, H], lm_head [D, H], weights [K, R], finals [R, H], target, loss, shares [R])` gives
    the sum, the unweighted losses [K, R] and hits [K, R] bool; a tie for the top counts as a hit. `loss`
    is one of `LOSSES`, by default the first, `shares` the s of each target, by default 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        lm_head: Tensor,
        weights: Tensor,
        finals: Tensor,
        target: TargetOutput,
        loss: str = LOSSES[0],
        shares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        by_hidden, by_head = ctx.needs_input_grad[:2]
        with without_autocast(hidden):
            work = lm_head.to(hidden.dtype)
            states, scales = to_targets(hidden), to_targets(weights)
            grad_states = torch.zeros_like(states) if by_hidden else None
            # In float32 even where products are not, since hundreds of chunks add up in it.
            grad_head = torch.zeros_like(work, dtype=weights.dtype) if by_head else None
            inside = weights.new_ones(len(finals)) if shares is None else shares.to(weights.dtype)
            losses, hits = torch.zeros_like(scales), torch.zeros_like(scales, dtype=torch.bool)
            for rows in _chunks(weights):
                # One matrix; for a batch of K, lm_head would be copied K times.
                chunk = states[:, rows].flatten(0, 1)  # [K * C, H]
                scores = (chunk @ work.t()).unflatten(0, (len(states), -1))
                row_loss = _fused_rows if is_fused(scores) else _rows
                losses[:, rows], hits[:, rows], by_score = row_loss(
                    scores, finals[rows], target, loss, inside[rows]
                )
                grad = by_score.flatten(0, 1).to(hidden.dtype)
                scale = scales[:, rows].flatten()[:, None]
                if grad_states is not None:
                    by_row = (grad @ work).mul_(scale)
                    grad_states[:, rows] = by_row.unflatten(0, (len(states), -1))
                if grad_head is not None:
                    _add_product(grad_head, grad.t(), (chunk * scale).to(grad.dtype))
        ctx.save_for_backward(None if grad_states is None else to_slots(grad_states), grad_head)
        ctx.head_dtype = lm_head.dtype
        losses, hits = to_slots(losses), to_slots(hits)
        ctx.mark_non_differentiable(losses, hits)
        return (losses * weights).sum(), losses, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None
            if grad_head is None
            else (grad_head * grad.to(grad_head.dtype)).to(ctx.head_dtype),
            *(None,) * 5,
        )


def _rows(
    products: Tensor, finals: Tensor, target: TargetOutput, loss: str, shares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and hits [K, C], and the logits' gradients [K, C, D], of one chunk.

    Args:
        products: [K, C, D] the head's logits.
        finals: [C, H] the target's states.
        shares: [C] the target's probability of the draft vocabulary.
    """
    logits = target.logits(finals)
    best = logits.argmax(-1, keepdim=True)
    probabilities = logits.softmax(-1)
    scores = at_least_float32(products)
    top = scores.amax(-1)
    hits = scores.gather(-1, best.expand(len(scores), -1, -1)).squeeze(-1) >= top
    # [C, 1, D] @ [C, D, K]: no [K, C, D] tensor of addends.
    expected = (probabilities[:, None] @ scores.permute(1, 2, 0)).squeeze(1).t()
    torch.softmax(scores, -1, out=scores)
    # The largest probability is exp(top - log-sum-exp).
    entropies = top - scores.amax(-1).log() - expected
    if loss == "cross_entropy":
        return entropies, hits, scores.sub_(probabilities)
    most = probabilities * shares.to(scores.dtype)[:, None]
    losses, by_score = _toward_acceptance(scores, probabilities, most, entropies, loss)
    return losses, hits, by_score


def _toward_acceptance(
    own: Tensor, given: Tensor, most: Tensor, entropies: Tensor, loss: str
) -> tuple[Tensor, Tensor]:
    """(losses [K, C], gradients [K, C, D]) of lk, tv or lk_hybrid.

    Args:
        own: [K, C, D] the head's probabilities q.
        given: [C, D] the target's p.
        most: [C, D] the target's s p.
        entropies: [K, C] cross-entropies.
    """
    is_below = own < most
    accepted = torch.where(is_below, own, most).sum(-1)
    by_score = own * ((own * is_below).sum(-1, keepdim=True) - is_below.to(own.dtype))  # of 1 - a
    if loss == "tv":
        return 1 - accepted, by_score
    if loss == "lk":
        floored = accepted.clamp(min=torch.finfo(own.dtype).tiny)
        return -floored.log(), by_score / floored[..., None]
    mix = torch.exp(-HYBRID_FACTOR * accepted)
    by_score = torch.lerp(by_score, own - given, mix[..., None])
    return torch.lerp(1 - accepted, entropies, mix), by_score


def _fused_rows(
    products: Tensor, finals: Tensor, target: TargetOutput, loss: str, shares: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`_rows` by one kernel, in place of `products`."""
    cap = target.softcap or 0.0
    given = target.products(finals)
    losses, hits = loss_rows(given, products, shares.float(), target.logit_scale, cap, loss)
    return losses, hits, products


def to_targets(by_slot: Tensor) -> Tensor:
    """[K, R, ...] by slot to [K, R, ...] by target: step k moves down k rows, zeros fill.

    Worked example, K = 2: [[a, b, c], [d, e, f]] becomes [[a, b, c], [0, d, e]], so that a column
    is scored against one p; f is scored against none.
    """
    by_target = torch.zeros_like(by_slot)
    for step, (into, values) in enumerate(zip(by_target, by_slot, strict=True)):
        into[step:] = values[: max(len(values) - step, 0)]
    return by_target


def to_slots(by_target: Tensor) -> Tensor:
    """The inverse: [[a, b, c], [0, d, e]] becomes [[a, b, c], [d, e, 0]]."""
    by_slot = torch.zeros_like(by_target)
    for step, (into, values) in enumerate(zip(by_slot, by_target, strict=True)):
        into[: max(len(values) - step, 0)] = values[step:]
    return by_slot


def _chunks(weights: Tensor) -> Iterator[slice]:
    """Even ranges of the R targets, with at most the chunk's rows of logits each."""
    num_steps, num_rows = weights.shape
    rows = CHUNK_ROWS if weights.is_cpu else ACCELERATOR_CHUNK_ROWS
    return even_slices(0, num_rows, max(1, rows // num_steps))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, in one pass where the dtypes are equal."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
