# SPDX-License-Identifier: Apache-2.0
"""Batches are made in a thread, ahead of the step that takes them.

The states are mapped from files, so making a batch is what reads the disk. For a GPU the batch is
put into page-locked memory, and its copy to the device runs behind the step before.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

from stages.train.data.dataset import Batch, Dataset, Sample, split_step

T = TypeVar("T")
_END = object()


def prefetched(items: Iterator[T], *, depth: int = 2) -> Iterator[T]:
    """The same items in the same order, made in a thread: `depth` ready ahead, one in hand.

    An error in making an item is raised where that item is taken.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = deque(thread.submit(next, items, _END) for _ in range(depth + 1))
        try:
            while (item := ahead.popleft().result()) is not _END:
                ahead.append(thread.submit(next, items, _END))
                yield cast(T, item)
        finally:
            thread.shutdown(cancel_futures=True)


def micro_batches(
    dataset: Dataset,
    steps: Iterable[list[Sample]],
    *,
    rank: int,
    num_ranks: int,
    micro_tokens: int,
    pin: bool,
) -> Iterator[tuple[list[Sample], list[Batch]]]:
    """For each step all its samples, and this rank's micro-batches of them."""
    for samples in steps:
        parts = split_step(samples, num_ranks=num_ranks, micro_tokens=micro_tokens)[rank]
        # A rank without a sample runs along on one of the others', of which nothing counts.
        batches = [
            dataset.batch(part) if part else dataset.batch(samples[:1]).silent() for part in parts
        ]
        yield samples, [batch.pinned() for batch in batches] if pin else batches
