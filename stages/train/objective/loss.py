# SPDX-License-Identifier: Apache-2.0
"""The TTT loss: which slots count, and what they are scored against.

In: packed documents with the target's states, the target's own output layer, a draft head.
Out: a scalar loss (soft cross-entropy or another of `LOSSES`) and, for each TTT step, sums that add
up over micro-batches and ranks.
Cost: that of `cross_entropy`, which takes gradients in the forward pass. So the counts that the means
divide by must be known beforehand; they follow from the masks alone.

Slot t at step k predicts token t + 2 + k. Its soft target is p_{t+1+k}, the target's distribution
AT token t + 1 + k. It counts if tokens t + 1 .. t + 2 + k are all answer of one document.

Shapes: R slots that count at step 0, K TTT steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stages.train.data.batch import Batch
from stages.train.kernels.fused import LOSSES
from stages.train.model import DraftHead
from stages.train.objective.cross_entropy import SlotLosses
from stages.train.objective.target_output import TargetOutput


class StepSums(NamedTuple):
    """Sums over slots for each TTT step, [K] float64 each. `torch.stack(sums)` travels as [4, K].

    Attributes:
        loss: losses over `in_vocab_slots`.
        in_vocab_slots: counted slots whose target's argmax is in the draft vocabulary.
        counted: counted slots.
        hits: `in_vocab_slots` whose draft argmax is the target's.
    """

    loss: Tensor
    in_vocab_slots: Tensor
    counted: Tensor
    hits: Tensor

    def accuracy(self) -> Tensor:
        """[K] hits / counted; 0 if nothing counts."""
        return self.hits / self.counted.clamp(min=1)

    def mean_loss(self, decay: float) -> float:
        """sum_k w_k L_k / sum_k w_k with L_k = loss / in_vocab_slots; empty steps are left out."""
        return float((step_weights(self.in_vocab_slots, decay) * self.loss).sum())


def combine(parts: Sequence[StepSums]) -> StepSums:
    """The total of several micro-batches or ranks."""
    return StepSums(*torch.stack([torch.stack(part) for part in parts]).sum(0))


def step_weights(in_vocab_slots: Tensor, decay: float) -> Tensor:
    """[K] what one slot of each step weighs: w_k / sum(w) / carried_k, with w_k = decay^k.

    Worked example, decay 0.5, in_vocab_slots [4, 2, 0]: w = [1, 0.5, 0] (no slot, no weight), so the
    weights are [1 / 1.5 / 4, 0.5 / 1.5 / 2, 0] = [1/6, 1/6, 0].
    """
    steps = torch.arange(len(in_vocab_slots), device=in_vocab_slots.device, dtype=torch.float64)
    weights = torch.where(in_vocab_slots > 0, decay**steps, 0.0)
    return weights / weights.sum().clamp(min=1e-300) / in_vocab_slots.clamp(min=1)


def ttt_loss(
    head: DraftHead,
    batch: Batch,
    target: TargetOutput,
    *,
    num_steps: int,
    decay: float,
    loss: str = LOSSES[0],
    in_vocab_slots: Tensor | None = None,
) -> tuple[Tensor, StepSums]:
    """The loss of one micro-batch, and its sums.

    Args:
        loss: one of `LOSSES`.
        in_vocab_slots: [K] the counts that L_k divides by, of all micro-batches and ranks of the
            optimizer step, so that their losses and gradients add up. None: of this micro-batch.
    """
    plan = batch.plan_for(num_steps)
    own = plan.in_vocab_slots.sum(1)
    total = own if in_vocab_slots is None else in_vocab_slots
    weights = step_weights(total, decay)[:, None] * plan.in_vocab_slots
    hidden = head(
        batch.input_ids,
        batch.aux_states,
        offsets=batch.offsets,
        slots=plan.slots,
        num_steps=num_steps,
        documents=plan.documents,
    )
    normed = head.to_lm_head(torch.stack(hidden))  # [K, R, H]
    finals = batch.final_states[plan.slots + 1]
    total_loss, losses, hits = SlotLosses.apply(
        normed,
        # An autograd function does not see no_grad; the detach keeps it from taking gradients.
        head.lm_head.weight if torch.is_grad_enabled() else head.lm_head.weight.detach(),
        weights.to(torch.promote_types(normed.dtype, torch.float32)),
        finals,
        target,
        loss,
        batch.in_vocab[plan.slots + 1],
    )
    sums = (
        (losses.double() * plan.in_vocab_slots).sum(1),
        own,
        plan.counted.sum(1),
        (hits & plan.in_vocab_slots).sum(1),
    )
    return total_loss, StepSums(*(x.double() for x in sums))
