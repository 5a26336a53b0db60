# SPDX-License-Identifier: Apache-2.0
"""The TTT loss: which slots count, what they are scored against, cross-entropy in chunks.

In: packed documents with the target's states, the target's own output layer, a draft head.
Out: a scalar loss and, for each TTT step, sums that add up over micro-batches and ranks.
Cost: one target and K draft products with lm_head for each counted slot, no [T, D] tensor: logits
live for one chunk of rows, and their gradients are taken on the spot.
The surprise: because of that, gradients are computed in the forward pass (where grad is enabled),
and the counts that the means divide by must be known beforehand. They follow from the data alone.

Slot t at step k predicts token t + 2 + k. Its soft target is p_{t+1+k}, the target's distribution
AT token t + 1 + k, and it counts where tokens t + 1 .. t + 2 + k are all answer of one document.

Shapes: T packed tokens, N documents, R slots that count at step 0, K TTT steps, H hidden size,
V target vocabulary, D draft vocabulary, C rows of a chunk.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.train.data import Batch
from stages.train.model import DraftHead

# One [K, C, D] tensor of logits; two or three live at once. Smaller chunks write the gradient of
# lm_head to memory more often, larger ones push the logits themselves out of the cache.
CHUNK_BYTES = 24 << 20
# An accelerator has no cache for them: there the gradient of lm_head shall be touched seldom.
ACCELERATOR_CHUNK_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class TargetOutput:
    """The target from its last pre-norm state to logits over the draft vocabulary.

    Attributes:
        norm_weight: [H] the factor in effect (gemma's 1 + w is added by the caller).
        norm_eps: of that RMS norm.
        lm_head: [D, H] the rows of the draft vocabulary, in draft order.
        logit_scale: factor on the logits.
        softcap: c of c * tanh(logits / c), or None.
    """

    norm_weight: Tensor
    norm_eps: float
    lm_head: Tensor
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, finals: Tensor) -> Tensor:
        """[C, H] states before the final norm to [C, D] logits, at least float32."""
        logits = F.linear(
            _normed(finals, self.norm_weight, self.norm_eps, self.lm_head.dtype), self.lm_head
        )
        logits = _at_least_float32(logits)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class StepSums(NamedTuple):
    """Sums over slots for each TTT step, [K] float64 each. `torch.stack(sums)` travels as [4, K].

    Attributes:
        loss: soft cross-entropy over the slots that carry loss.
        carried: how many carry loss: counted, and the target's argmax is in the draft vocabulary.
        counted: how many count.
        hits: counted slots whose draft argmax is the target's; outside the vocabulary, a miss.
    """

    loss: Tensor
    carried: Tensor
    counted: Tensor
    hits: Tensor

    def accuracy(self) -> Tensor:
        """[K] hits / counted; 0 where nothing counts."""
        return self.hits / self.counted.clamp(min=1)

    def mean_loss(self, decay: float) -> float:
        """sum_k w_k L_k / sum_k w_k with L_k = loss / carried; steps without slots are left out."""
        return float((step_weights(self.carried, decay) * self.loss).sum())


def combine(parts: Sequence[StepSums]) -> StepSums:
    """The sums of several micro-batches or ranks together."""
    return StepSums(*torch.stack([torch.stack(part) for part in parts]).sum(0))


def step_weights(carried: Tensor, decay: float) -> Tensor:
    """[K] what one slot of each step weighs: w_k / sum(w) / carried_k, with w_k = decay^k.

    Worked example, decay 0.5, carried [4, 2, 0]: w = [1, 0.5, 0] (no slot, no weight), so the
    weights are [1 / 1.5 / 4, 0.5 / 1.5 / 2, 0] = [1/6, 1/6, 0].
    """
    steps = torch.arange(len(carried), device=carried.device, dtype=torch.float64)
    weights = torch.where(carried > 0, decay**steps, 0.0)
    return weights / weights.sum().clamp(min=1e-300) / carried.clamp(min=1)


def counted_slots(loss_mask: Tensor, offsets: Tensor, num_steps: int) -> Tensor:
    """[K, T] bool: slot t counts at step k where tokens t+1 .. t+2+k are answer of one document.

    Worked example, document 0 = tokens 0..5 with answer 2..5, document 1 = tokens 6..8, all answer:

        token    0 1 2 3 4 5 | 6 7 8
        answer   . . x x x x | x x x
        step 0   . x x x . . | x . .      slot 1 drafts token 3, the first drafted of the turn
        step 1   . x x . . . | . . .      slot 6 would draft token 9
    """
    rows = torch.arange(len(loss_mask), device=loss_mask.device)
    ends = offsets[1:][torch.bucketize(rows, offsets[1:], right=True)]
    answer = F.pad(loss_mask.bool(), (0, num_steps + 1))
    counted, steps = answer[1 : len(rows) + 1], []
    for last in range(2, num_steps + 2):
        counted = counted & answer[last : last + len(rows)] & (rows + last < ends)
        steps.append(counted)
    return torch.stack(steps)


class CountedRows(NamedTuple):
    """The slots that count at step 0, and what becomes of them at each step.

    Attributes:
        slots: [R] int64, ascending. What counts at a later step counts at step 0 too.
        counted: [K, R] bool.
        carried: [K, R] bool, counted and the target's argmax is in the draft vocabulary.
    """

    slots: Tensor
    counted: Tensor
    carried: Tensor


def counted_rows(batch: Batch, num_steps: int) -> CountedRows:
    """Gate the slots. `counted_rows(...).carried.sum(1)` is what `ttt_loss` takes as `carried`.

    Worked example: slot 4 at step 1 is scored against p_6, so `in_vocab[6]` decides.
    """
    counted = counted_slots(batch.loss_mask, batch.offsets, num_steps)
    slots = counted[0].nonzero().flatten()
    steps = torch.arange(num_steps, device=slots.device)[:, None]
    scored_at = (slots + 1 + steps).clamp(max=len(batch.input_ids) - 1)
    counted = counted[:, slots]
    return CountedRows(slots, counted, counted & batch.in_vocab[scored_at])


def target_argmax(
    finals: Tensor, *, norm_weight: Tensor, norm_eps: float, lm_head: Tensor, chunk_rows: int = 256
) -> Tensor:
    """[T] int64: the target's most likely next token over its full vocabulary, at each token.

    A scale above 0 and a softcap keep the order, so they are not asked for. With it,
    `in_vocab = t2d[target_argmax(...)]`, made once with the data.
    """
    parts = [
        F.linear(_normed(chunk, norm_weight, norm_eps, lm_head.dtype), lm_head).argmax(-1)
        for chunk in finals.split(chunk_rows)
    ]
    return torch.cat(parts) if parts else finals.new_zeros(0, dtype=torch.int64)


def ttt_loss(
    head: DraftHead,
    batch: Batch,
    target: TargetOutput,
    *,
    num_steps: int,
    decay: float,
    carried: Tensor | None = None,
) -> tuple[Tensor, StepSums]:
    """The loss of one micro-batch, and its sums.

    Args:
        carried: [K] the counts that L_k divides by: those of ALL micro-batches and ranks of the
            optimizer's step, so that their losses (and gradients) add up to the whole batch's.
            None: this micro-batch is the whole.
    """
    rows = counted_rows(batch, num_steps)
    own = rows.carried.sum(1)
    weights = step_weights(own if carried is None else carried, decay)[:, None] * rows.carried
    hidden = head(
        batch.input_ids,
        batch.aux_states,
        offsets=batch.offsets,
        slots=rows.slots,
        num_steps=num_steps,
    )
    normed = head.norm(torch.stack(hidden))  # [K, R, H]
    finals = batch.final_states[rows.slots + 1]
    loss, entropy, hits = SoftCrossEntropy.apply(
        normed,
        # An autograd function does not see no_grad: without the detach it would take gradients.
        head.lm_head.weight if torch.is_grad_enabled() else head.lm_head.weight.detach(),
        weights.to(torch.promote_types(normed.dtype, torch.float32)),
        finals,
        target,
    )
    sums = (
        (entropy.double() * rows.carried).sum(1),
        own,
        rows.counted.sum(1),
        (hits & rows.carried).sum(1),
    )
    return loss, StepSums(*(x.double() for x in sums))


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
            for rows in _chunks(weights, len(lm_head)):
                logits = target.logits(finals[rows])
                best = logits.argmax(-1, keepdim=True)
                probabilities = logits.softmax(-1)
                chunk = states[:, rows]  # [K, C, H]
                scores = _at_least_float32(chunk @ work.t())  # [K, C, D]
                top = scores.amax(-1)
                hits[:, rows] = (
                    scores.gather(-1, best.expand(len(chunk), -1, -1)).squeeze(-1) >= top
                )
                # [C, 1, D] @ [C, D, K]: a product a row, no [K, C, D] of addends.
                expected = (probabilities[:, None] @ scores.permute(1, 2, 0)).squeeze(1).t()
                torch.softmax(scores, -1, out=scores)
                # The largest probability is exp(top - log-sum-exp).
                entropy[:, rows] = top - scores.amax(-1).log() - expected
                grad = scores.sub_(probabilities).to(hidden.dtype)
                scale = scales[:, rows, None]
                if grad_states is not None:
                    grad_states[:, rows] = (grad @ work).mul_(scale)
                if grad_head is not None:
                    scaled = (chunk * scale).to(grad.dtype)
                    _add_product(grad_head, grad.flatten(0, 1).t(), scaled.flatten(0, 1))
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


def _chunks(weights: Tensor, draft_vocab_size: int) -> Iterator[slice]:
    """Even ranges of the R targets whose [K, C, D] logits keep within a chunk's bytes."""
    num_steps, num_rows = weights.shape
    chunk_bytes = CHUNK_BYTES if weights.is_cpu else ACCELERATOR_CHUNK_BYTES
    most = max(1, chunk_bytes // (num_steps * draft_vocab_size * weights.element_size()))
    number = -(-num_rows // most)
    cuts = [i * num_rows // number for i in range(number + 1)] if number else []
    yield from itertools.starmap(slice, itertools.pairwise(cuts))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, in one pass where their dtypes are one."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _normed(finals: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMS norm of [C, H], in float32 inside and `dtype` outside."""
    precise = _at_least_float32(finals)
    return F.rms_norm(precise, weight.shape, weight.to(precise.dtype), eps).to(dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
