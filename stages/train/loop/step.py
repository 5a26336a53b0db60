# SPDX-License-Identifier: Apache-2.0
"""One optimizer step: its micro-batches forward and backward, clipping, AdamW.

In: the micro-batches of this rank. Out: their sums; updated weights. Cost: see the README's floor.

Losses are divided by the counts of all micro-batches and ranks of the step, which follow from the
masks alone. So gradients add up, and the division of a step's samples among ranks and micro-batches
changes nothing but the order of a sum.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from stages.train.data.batch import Batch
from stages.train.kernels.fused import LOSSES
from stages.train.model import DraftHead
from stages.train.objective.loss import StepSums, combine, ttt_loss
from stages.train.objective.target_output import TargetOutput


class TrainingStep(nn.Module):
    """Head and loss as one module: DDP and FSDP2 must see every use of a weight in its forward."""

    def __init__(
        self,
        head: DraftHead,
        target: TargetOutput,
        *,
        num_steps: int,
        decay: float,
        loss: str = LOSSES[0],
    ) -> None:
        super().__init__()
        self.head = head
        self.target = target
        self.num_steps = num_steps
        self.decay = decay
        self.loss = loss

    def forward(
        self, batch: Batch, in_vocab_slots: Tensor | None = None
    ) -> tuple[Tensor, StepSums]:
        """`ttt_loss` of one micro-batch."""
        return ttt_loss(
            self.head,
            batch,
            self.target,
            num_steps=self.num_steps,
            decay=self.decay,
            loss=self.loss,
            in_vocab_slots=in_vocab_slots,
        )


def train_step(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    *,
    num_steps: int,
    max_grad_norm: float,
    profile: bool = False,
) -> tuple[Tensor, StepSums]:
    """One update of the weights. Returns this rank's share of the loss, and its sums.

    Args:
        module: a `TrainingStep`, as `distributed.joined` returned it.
        micro_batches: of this rank; every rank has the same number, at least one.
        num_steps: TTT steps K.
        profile: mark the parts with NVTX ranges.
    """
    micro_batches = [b if b.plan else b.planned(num_steps) for b in micro_batches]
    own = torch.stack([b.plan_for(num_steps).in_vocab_slots.sum(1) for b in micro_batches]).sum(0)
    in_vocab_slots = accelerator.reduce(own) if accelerator.num_processes > 1 else own
    optimizer.zero_grad(set_to_none=True)
    losses, sums = [], []
    for index, batch in enumerate(micro_batches):
        with _communicating(accelerator, module, index == len(micro_batches) - 1):
            with _range("forward and loss", profile), accelerator.autocast():
                loss, part = module(batch, in_vocab_slots)
            with _range("backward", profile):
                # Ranks' gradients are averaged; the losses were divided by the global counts.
                accelerator.backward(loss * accelerator.num_processes)
        losses.append(loss.detach())
        sums.append(part)
    with _range("optimizer", profile):
        torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
        optimizer.step()
    return torch.stack(losses).sum(), combine(sums)


@contextlib.contextmanager
def _communicating(accelerator: Accelerator, module: nn.Module, last: bool) -> Iterator[None]:
    """Ranks exchange gradients only in the backward pass of the last micro-batch."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        yield
    elif last:
        yield
    else:
        with accelerator.no_sync(module):
            yield


def _range(name: str, profile: bool) -> contextlib.AbstractContextManager[Any]:
    """An NVTX range in a CUDA profile; nothing on a CPU."""
    use = profile and torch.cuda.is_available()
    return torch.cuda.nvtx.range(name) if use else contextlib.nullcontext()
