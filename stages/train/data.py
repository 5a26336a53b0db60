# SPDX-License-Identifier: Apache-2.0
"""dump's shards -> packed batches.

Legend: T tokens of a batch, N its documents, A aux layers, H hidden size.

The order is a pure function of seed and epoch, so a step number alone says where the data stands.
"""

import dataclasses
import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from shared import hidden_states
from shared.hidden_states import Shard


@dataclasses.dataclass(frozen=True)
class Batch:
    """Documents one after another, without padding."""

    input_ids: torch.Tensor  # [T] int64
    loss_mask: torch.Tensor  # [T] bool
    aux_states: torch.Tensor  # [T, A*H] bfloat16
    final_states: torch.Tensor  # [T, H] bfloat16, before the target's final norm
    offsets: torch.Tensor  # [N+1] int64
    in_vocab: torch.Tensor  # [T] bool: the target's argmax at t is in the draft vocabulary
    sample_ids: tuple[str, ...]

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        return Batch(
            input_ids=self.input_ids.to(device),
            loss_mask=self.loss_mask.to(device),
            aux_states=self.aux_states.to(device),
            final_states=self.final_states.to(device),
            offsets=self.offsets.to(device),
            in_vocab=self.in_vocab.to(device),
            sample_ids=self.sample_ids,
        )


@dataclasses.dataclass(frozen=True)
class Sample:
    """Where one document lies."""

    sample_id: str
    shard: int
    rows: slice

    @property
    def num_tokens(self) -> int:
        return self.rows.stop - self.rows.start


class Dataset:
    """All samples of a dump, split into training and held-out ones by a hash of their ids."""

    def __init__(
        self,
        folder: Path,
        data_config: dict[str, Any],
        names: Sequence[str],
        *,
        holdout_fraction: float,
        max_holdout_samples: int,
    ) -> None:
        num_states = len(data_config["hidden_states"]["layer_ids"])
        hidden_size = data_config["model"]["hidden_size"]
        self.shards: list[Shard] = [
            hidden_states.read_shard(folder / name, num_states=num_states, hidden_size=hidden_size)
            for name in sorted(names)
        ]
        self.in_vocab: list[torch.Tensor] = []  # per shard [T] bool, set by `set_in_vocab`
        samples = [
            Sample(sample_id, index, shard.rows(row))
            for index, shard in enumerate(self.shards)
            for row, sample_id in enumerate(shard.sample_ids)
        ]
        by_hash = sorted(samples, key=lambda sample: _hash(sample.sample_id))
        held = min(round(len(samples) * holdout_fraction), max_holdout_samples, len(samples) - 1)
        if holdout_fraction > 0 and len(samples) > 1:
            held = max(held, 1)
        chosen = {sample.sample_id for sample in by_hash[:held]}
        self.held_out = [sample for sample in samples if sample.sample_id in chosen]
        self.training = [sample for sample in samples if sample.sample_id not in chosen]

    def set_in_vocab(self, flags: Sequence[torch.Tensor]) -> None:
        """Take, for each shard, [T] bool: the target's argmax there is in the draft vocabulary."""
        self.in_vocab = list(flags)

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """The samples as one packed batch."""
        parts = [(self.shards[sample.shard], sample) for sample in samples]
        states = torch.cat([shard.hidden_states[sample.rows] for shard, sample in parts])
        lengths = torch.tensor([0, *(sample.num_tokens for sample in samples)])
        return Batch(
            input_ids=torch.cat([shard.input_ids[sample.rows] for shard, sample in parts]).long(),
            loss_mask=torch.cat([shard.loss_mask[sample.rows] for shard, sample in parts]).bool(),
            aux_states=states[:, :-1].flatten(1),
            final_states=states[:, -1],
            offsets=lengths.cumsum(0),
            in_vocab=torch.cat([self.in_vocab[s.shard][s.rows] for s in samples]),
            sample_ids=tuple(sample.sample_id for sample in samples),
        )


def _hash(sample_id: str) -> str:
    return hashlib.sha256(sample_id.encode()).hexdigest()


def pack(samples: Sequence[Sample], batch_tokens: int) -> list[list[Sample]]:
    """Fill batches in order; a batch holds at most `batch_tokens`, or one longer sample alone.

    Worked example, lengths [5, 3, 4, 9], 8 tokens: [[5, 3], [4], [9]].
    """
    batches: list[list[Sample]] = []
    room = 0
    for sample in samples:
        if not batches or sample.num_tokens > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(sample)
        room -= sample.num_tokens
    return batches


def epoch_batches(
    samples: Sequence[Sample], *, batch_tokens: int, seed: int, epoch: int
) -> list[list[Sample]]:
    """The batches of one epoch: shuffled by seed and epoch alone."""
    order = list(samples)
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return pack(order, batch_tokens)


def training_batches(
    samples: Sequence[Sample], *, batch_tokens: int, seed: int, epochs: int
) -> Iterator[list[Sample]]:
    """Every epoch's batches, one after another."""
    for epoch in range(epochs):
        yield from epoch_batches(samples, batch_tokens=batch_tokens, seed=seed, epoch=epoch)
