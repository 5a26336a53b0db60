# SPDX-License-Identifier: Apache-2.0
"""The walk over the held-out answers, divided among the ranks."""

import itertools

import torch
from accelerate import Accelerator
from torch import nn

from stages.train.config import TrainConfig
from stages.train.data.batch import Batch
from stages.train.data.dataset import Dataset, Sample, pack
from stages.train.data.loader import loaded, ready
from stages.train.loop import distributed
from stages.train.objective.walk import Walk, walked_acceptance_length


def walk_held_out(
    config: TrainConfig,
    module: nn.Module,
    dataset: Dataset,
    accelerator: Accelerator,
    batch_tokens: int,
    *,
    blocks: bool,
) -> Walk:
    """The walk over all held-out samples; every rank calls it.

    Args:
        blocks: whether the batches' plans need attention's blocks.
    """
    rank, ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    tokens, parts = config.walk_tokens, pack(dataset.held_out[rank::ranks], batch_tokens)

    def make(part: list[Sample]) -> list[Batch]:
        return [ready(dataset, part, tokens, pin=device.type == "cuda", blocks=blocks)]

    batches = itertools.chain.from_iterable(loaded(iter(parts), make, device))
    with distributed.whole(module) as head, accelerator.autocast():
        own = walked_acceptance_length(head, batches, tokens)
    if ranks == 1:
        return own
    counts = torch.tensor([own.drafts, *own.accepted_by_position], device=accelerator.device)
    drafts, *by_position = accelerator.reduce(counts).tolist()
    return Walk(sum(by_position), drafts, tuple(by_position))
