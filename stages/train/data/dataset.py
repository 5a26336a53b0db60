# SPDX-License-Identifier: Apache-2.0
"""dump's files -> packed batches.

Legend: T tokens of a batch, A aux layers, H hidden size.

The order depends on seed and epoch alone, so a step number is enough to continue.
"""

import collections
import dataclasses
import functools
import itertools
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shared.artifacts.checksums import require_unchanged
from shared.artifacts.window import sample_hash
from shared.contracts import hidden_states
from shared.contracts.hidden_states import Shard
from shared.contracts.row_files import RowFile
from stages.train.data.batch import Batch

if TYPE_CHECKING:
    from stages.train.data.followed import FollowedShards

BUFFER_SHARDS = 8  # mixed with each other; the page cache should hold them, about 1 GiB each


@dataclasses.dataclass(frozen=True)
class Sample:
    """Where one document is."""

    sample_id: str
    shard: int
    rows: slice

    @property
    def num_tokens(self) -> int:
        return self.rows.stop - self.rows.start


class Dataset:
    """All samples of a dump, split into training and held-out ones by a hash of their ids.

    Worked example: hashes order five samples as [c, a, e, b, d]. With one held out and
    `max_samples` 2, c is held out and [a, e] train; with 3, [a, e, b] train and c is still held out.
    """

    def __init__(
        self,
        folder: Path,
        data_config: dict[str, Any],
        names: Sequence[str],
        *,
        holdout_fraction: float,
        max_holdout_samples: int,
        max_samples: int | None = None,
        manifest: Mapping[str, Any] | None = None,
        followed: "FollowedShards | None" = None,
    ) -> None:
        self.followed = followed
        self._folder, self._manifest, self._names = folder, manifest, sorted(names)
        num_states = len(data_config["hidden_states"]["layer_ids"])
        hidden_size = data_config["model"]["hidden_size"]
        self.shards: Sequence[Shard | RowFile] = followed or [
            hidden_states.read_shard(folder / name, num_states=num_states, hidden_size=hidden_size)
            if Path(name).name.startswith("shard_")
            else RowFile(folder / name, num_states, hidden_size)
            for name in self._names
        ]
        self.in_vocab: Sequence[torch.Tensor] = []  # per shard [T] float16, set by `set_in_vocab`
        samples = (
            followed.samples()
            if followed
            else [
                Sample(sample_id, index, shard.rows(row))
                for index, shard in enumerate(self.shards)
                for row, sample_id in enumerate(shard.sample_ids)
            ]
        )
        by_hash = sorted(samples, key=lambda sample: sample_hash(sample.sample_id))
        held = min(round(len(samples) * holdout_fraction), max_holdout_samples, len(samples) - 1)
        if holdout_fraction > 0 and len(samples) > 1:
            held = max(held, 1)
        rank = {sample.sample_id: index for index, sample in enumerate(by_hash)}
        end = len(samples) if max_samples is None else held + max_samples
        self.held_out = [sample for sample in samples if rank[sample.sample_id] < held]
        self.training = [sample for sample in samples if held <= rank[sample.sample_id] < end]
        self._used: dict[int, list[slice]] = collections.defaultdict(list)
        for sample in (*self.training, *self.held_out):
            self._used[sample.shard].append(sample.rows)
        if followed:
            followed.stay_open(sample.shard for sample in self.held_out)

    def used(self, shard: int) -> torch.Tensor:
        """[T] bool: a shard's tokens that are in samples to train on or held out."""
        used = torch.zeros(len(self.shards[shard].input_ids), dtype=torch.bool)
        for rows in self._used[shard]:
            used[rows] = True
        return used

    def require_unchanged(self, shard: int) -> None:
        """Compare a shard with its checksum in dump's manifest, if that was given.

        Raises:
            UserError: it is damaged.
        """
        if self._manifest is not None:
            require_unchanged(self._folder, self._manifest, [self._names[shard]])

    def set_in_vocab(self, shares: Sequence[torch.Tensor]) -> None:
        """Set, for each shard, `Batch.in_vocab` of its tokens, float16."""
        self.in_vocab = shares

    def batch(self, samples: Sequence[Sample], *, pin: bool = False) -> Batch:
        """The samples as one packed batch.

        Args:
            pin: have its states in page-locked memory; `Batch.pinned` would copy them once more.

        Raises:
            UserError: a file is damaged.
        """
        parts = [(self.shards[sample.shard], sample) for sample in samples]
        # All are asked for before the first is copied, so that the disk reads ahead.
        states = [shard.states(sample.rows) for shard, sample in parts]
        offsets = [0, *itertools.accumulate(sample.num_tokens for sample in samples)]
        num_aux, hidden = states[0].shape[1] - 1, states[0].shape[2]
        empty = functools.partial(torch.empty, dtype=states[0].dtype, pin_memory=pin)
        aux, final = empty(offsets[-1], num_aux, hidden), empty(offsets[-1], hidden)
        for (start, stop), part in zip(itertools.pairwise(offsets), states, strict=True):
            aux[start:stop], final[start:stop] = part[:, :-1], part[:, -1]
        return Batch(
            input_ids=torch.cat([shard.input_ids[sample.rows] for shard, sample in parts]).long(),
            loss_mask=torch.cat([shard.loss_mask[sample.rows] for shard, sample in parts]).bool(),
            aux_states=aux.flatten(1),
            final_states=final,
            offsets=torch.tensor(offsets),
            in_vocab=torch.cat([self.in_vocab[s.shard][s.rows].float() for s in samples]),
            sample_ids=tuple(sample.sample_id for sample in samples),
        )


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


def shuffled(
    samples: Sequence[Sample], *, seed: int, epoch: int, is_mixed: bool = True
) -> list[Sample]:
    """The order of one epoch, which depends on seed and epoch alone.

    Shards come in random order, and samples of at most `BUFFER_SHARDS` of them are mixed at a time,
    so that a network volume reads whole shards in sequence. With fewer shards than that, it is a
    plain shuffle.

    Args:
        is_mixed: false: one shard after the other, so that none is needed for long. A window's
            shards need no mixing: their samples are drawn by a hash.
    """
    source = random.Random(f"{seed}/{epoch}")
    by_shard: dict[int, list[Sample]] = {}
    for sample in samples:
        by_shard.setdefault(sample.shard, []).append(sample)
    shards = [by_shard[shard] for shard in sorted(by_shard)]
    source.shuffle(shards)
    if not is_mixed:
        for shard in shards:
            source.shuffle(shard)
        return list(itertools.chain.from_iterable(shards))
    size = sum(len(shard) for shard in shards[:BUFFER_SHARDS])
    waiting = deque(shards)
    buffer: list[Sample] = []
    order: list[Sample] = []
    while waiting or buffer:
        while waiting and len(buffer) < size:
            buffer += waiting.popleft()
        drawn = source.randrange(len(buffer))
        buffer[drawn], buffer[-1] = buffer[-1], buffer[drawn]
        order.append(buffer.pop())
    return order


def training_steps(
    samples: Sequence[Sample], *, batch_tokens: int, seed: int, epochs: int, is_mixed: bool = True
) -> Iterator[list[Sample]]:
    """The samples of every optimizer step, epoch after epoch."""
    for epoch in range(epochs):
        yield from pack(shuffled(samples, seed=seed, epoch=epoch, is_mixed=is_mixed), batch_tokens)


def split_step(
    samples: Sequence[Sample], *, num_ranks: int, micro_tokens: int
) -> list[list[list[Sample]]]:
    """One step's samples as [rank][micro-batch], balanced in tokens.

    Every rank gets the same number of micro-batches, some of them empty.

    Worked example, lengths [5, 3, 4, 9], 2 ranks, 9 tokens per micro-batch: the longest first, each
    to the emptier rank, gives [9, 3] and [5, 4]. So rank 0 has [[9], [3]], rank 1 [[5, 4], []].
    """
    ranks: list[list[Sample]] = [[] for _ in range(num_ranks)]
    if num_ranks == 1:
        ranks[0] = list(samples)
    else:
        loads = [0] * num_ranks
        for sample in sorted(samples, key=lambda s: (-s.num_tokens, s.sample_id)):
            rank = loads.index(min(loads))
            ranks[rank].append(sample)
            loads[rank] += sample.num_tokens
    packed = [pack(part, micro_tokens) for part in ranks]
    count = max(len(micros) for micros in packed)
    return [[*micros, *[[] for _ in range(count - len(micros))]] for micros in packed]
