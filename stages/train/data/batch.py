# SPDX-License-Identifier: Apache-2.0
"""Packed documents, and the plan of which slots of them run at which TTT step.

A plan needs only masks, so the loader's thread makes it on the CPU. A step on an accelerator then
never waits for the device to learn a shape.

Legend: T tokens of a batch, N its documents, A aux layers, H hidden size, K TTT steps, R slots that
count at step 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.train.kernels.blocks import Block, Document, attention_blocks


class Plan(NamedTuple):
    """The slots that count at step 0, and their part in each step.

    Attributes:
        slots: [R] int64, ascending. What counts at a later step counts at step 0 too.
        counted: [K, R] bool.
        in_vocab_slots: [K, R] bool, counted and the target's argmax is in the draft vocabulary.
        documents: blocks of attention rows; empty if a kernel needs none.
    """

    slots: Tensor
    counted: Tensor
    in_vocab_slots: Tensor
    documents: list[Document]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Plan":
        """The same plan with every tensor changed."""
        documents = [
            Document(tokens, [Block(rows, keys, change(later)) for rows, keys, later in blocks])
            for tokens, blocks in self.documents
        ]
        slots, counted, in_vocab = (change(tensor) for tensor in self[:3])
        return Plan(slots, counted, in_vocab, documents)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Documents one after another, without padding."""

    input_ids: Tensor  # [T] int64
    loss_mask: Tensor  # [T] bool
    aux_states: Tensor  # [T, A*H] bfloat16
    final_states: Tensor  # [T, H] bfloat16, before the target's final norm
    offsets: Tensor  # [N+1] int64
    # [T] float32: the target's probability of the draft vocabulary at t; 0 where its argmax is outside.
    in_vocab: Tensor
    sample_ids: tuple[str, ...]
    plan: Plan | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`, copied without a wait if it is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, which a GPU copies from without a wait."""
        return self._map(torch.Tensor.pin_memory)

    def silent(self) -> "Batch":
        """The same batch in which no token counts."""
        return dataclasses.replace(self, loss_mask=torch.zeros_like(self.loss_mask), plan=None)

    def planned(self, num_steps: int, *, blocks: bool = True) -> "Batch":
        """The same batch with its plan for `num_steps` TTT steps."""
        return dataclasses.replace(self, plan=make_plan(self, num_steps, blocks=blocks))

    def plan_for(self, num_steps: int, *, blocks: bool = True) -> Plan:
        """The plan that was made before, or a new one."""
        return self.plan or make_plan(self, num_steps, blocks=blocks)

    def on_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until `stream` has used it; another stream allocated it."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self._map(record)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        plan = self.plan.map(change) if self.plan else None
        return dataclasses.replace(self, **tensors, plan=plan)


def counted_slots(loss_mask: Tensor, offsets: Tensor, num_steps: int) -> Tensor:
    """[K, T] bool: slot t counts at step k if tokens t+1 .. t+2+k are answer of one document.

    Worked example, documents of 6 and 3 tokens, answers marked x, K = 2:

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


def make_plan(batch: Batch, num_steps: int, *, blocks: bool = True) -> Plan:
    """The plan of a batch; `make_plan(...).in_vocab_slots.sum(1)` is what `ttt_loss` divides by.

    Worked example: slot 4 at step 1 is scored against p_6, so `in_vocab[6] > 0` decides.
    """
    counted = counted_slots(batch.loss_mask, batch.offsets, num_steps)
    slots = counted[0].nonzero().flatten()
    steps = torch.arange(num_steps, device=slots.device)[:, None]
    scored_at = (slots + 1 + steps).clamp(max=len(batch.input_ids) - 1)
    counted = counted[:, slots]
    documents = attention_blocks(slots, batch.offsets) if blocks else []
    return Plan(slots, counted, counted & (batch.in_vocab[scored_at] > 0), documents)
