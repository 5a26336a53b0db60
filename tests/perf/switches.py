# SPDX-License-Identifier: Apache-2.0
"""Our step with one of its ideas taken out, to see what that idea is worth.

Each switch replaces a part by the straightforward one; values and gradients stay the same.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.train import layer as layer_module
from stages.train import model as model_module
from stages.train.data import batch as batch_module
from stages.train.data.batch import Batch, Plan
from stages.train.kernels.blocks import Document, attention_blocks
from stages.train.objective import loss as loss_module
from stages.train.objective.target_output import TargetOutput


def _every_slot() -> None:
    """Every slot runs each step and reaches lm_head and loss, counted or not."""
    make_plan = batch_module.make_plan

    def all_rows(batch: Batch, num_steps: int, **options: bool) -> Plan:
        rows = make_plan(batch, num_steps, **options)
        slots = torch.arange(len(batch.input_ids) - 1)
        spread = torch.zeros(2, num_steps, len(slots), dtype=torch.bool)
        spread[:, :, rows.slots] = torch.stack((rows.counted, rows.in_vocab_slots))
        return Plan(slots, *spread, attention_blocks(slots, batch.offsets))

    batch_module.make_plan = all_rows


class _StoredLoss:
    """Logits of all rows and steps at once, gradients by autograd."""

    @staticmethod
    def apply(
        hidden: Tensor,
        lm_head: Tensor,
        weights: Tensor,
        finals: Tensor,
        target: TargetOutput,
        *_: object,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            logits = target.logits(finals)
            shifted = torch.stack([logits.roll(-k, 0) for k in range(len(hidden))])
            probabilities, best = shifted.softmax(-1), shifted.argmax(-1, keepdim=True)
        scores = F.linear(hidden, lm_head.to(hidden.dtype)).float().log_softmax(-1)
        entropy = -(scores * probabilities).sum(-1)
        hits = (scores.gather(-1, best) >= scores.amax(-1, keepdim=True)).squeeze(-1)
        return (entropy * weights).sum(), entropy.detach(), hits


def _stored_logits() -> None:
    """No chunks: [K, R, D] logits are stored for the backward pass."""
    loss_module.SlotLosses = _StoredLoss


class _DenseAttention:
    """One masked attention over the step-0 keys and every chain's keys: R x (T + kR) scores."""

    @staticmethod
    def apply(
        query: Tensor, key: Tensor, value: Tensor, documents: list[Document], *chain: Tensor
    ) -> Tensor:
        slots = len(query)
        mask = torch.zeros(slots, len(key), dtype=torch.bool)
        for tokens, blocks in documents:
            for rows, num_keys, later in blocks:
                shown = mask[rows, tokens.start : min(tokens.start + num_keys, tokens.stop)]
                shown[:] = True
                masked = num_keys - later.shape[-1]
                shown[:, masked:] = ~later[: len(shown), 0, : shown.shape[1] - masked]
        mask = torch.cat([mask, *[torch.eye(slots, dtype=torch.bool)] * (len(chain) // 2)], dim=1)
        keys, values = (torch.cat([first, *rest]) for first, rest in _joined(key, value, chain))
        heads_first = (x.transpose(0, 1)[None] for x in (query, keys, values))
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)


def _joined(
    key: Tensor, value: Tensor, chain: tuple[Tensor, ...]
) -> list[tuple[Tensor, list[Tensor]]]:
    return [(key, list(chain[::2])), (value, list(chain[1::2]))]


def _dense_mask() -> None:
    model_module.ChainAttention = _DenseAttention


def _project_each_step() -> None:
    """The embedding half of q, k, v is projected again at every step."""

    class Projecting:
        def __init__(self, embeddings: Tensor, weight: Tensor) -> None:
            self.embeddings, self.weight = embeddings, weight

        def index_select(self, dim: int, rows: Tensor) -> Tensor:
            return F.linear(self.embeddings.index_select(dim, rows), self.weight)

    linear, halves = F.linear, layer_module.Attention.halves
    weights: list[Tensor] = []

    def remembering(self: Any) -> tuple[Tensor, Tensor]:
        weights[:] = halves(self)
        return weights[0], weights[1]

    def lazy(inputs: Tensor, weight: Tensor, *bias: Tensor) -> Any:
        if weights and weight is weights[0]:
            return Projecting(inputs, weight)
        return linear(inputs, weight, *bias)

    functional = type("functional", (), dict(vars(F)) | {"linear": staticmethod(lazy)})
    layer_module.Attention.halves = remembering
    model_module.F = functional  # only the head's own calls


PARTS: dict[str, tuple[str, Callable[[], None]]] = {
    "slots": ("only counted slots run and reach the loss", _every_slot),
    "loss": ("loss in chunks, gradients on the spot", _stored_logits),
    "projection": ("embedding half projected once", _project_each_step),
    "attention": ("blocks with columns for the chain, instead of a mask", _dense_mask),
    "optimizer": ("AdamW in one pass", lambda: None),  # the side makes its optimizer itself
}


def switch_off(name: str) -> None:
    """Take one idea out of the step, in this process."""
    PARTS[name][1]()
