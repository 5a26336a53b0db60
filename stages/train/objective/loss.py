# SPDX-License-Identifier: Apache-2.0
"""The TTT loss: which slots count, and what they are scored against.

In: packed documents with the target's states, the target's own output layer, a draft head.
Out: a scalar loss and, for each TTT step, sums that add up over micro-batches and ranks.
Cost: that of `cross_entropy`.
The surprise: gradients of the logits are taken in the forward pass, so the counts that the means
divide by must be known beforehand. They follow from the data alone.

Slot t at step k predicts token t + 2 + k. Its soft target is p_{t+1+k}, the target's distribution
AT token t + 1 + k, and it counts where tokens t + 1 .. t + 2 + k are all answer of one document.

Shapes: T packed tokens, N documents, R slots that count at step 0, K TTT steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.train.data.dataset import Batch
from stages.train.model import DraftHead
from stages.train.objective.cross_entropy import SoftCrossEntropy
from stages.train.objective.target_output import TargetOutput


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
