# SPDX-License-Identifier: Apache-2.0
"""Threads that make batches ahead of the training step.

States are mapped from files, so making a batch reads the disk. For a GPU several threads fill
page-locked buffers, and a stream of its own copies them while the step before still runs.
"""

import concurrent.futures
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from stages.train.data.batch import Batch
from stages.train.data.dataset import Dataset, Sample, split_step

J = TypeVar("J")
T = TypeVar("T")


def prefetched(
    jobs: Iterator[J],
    make: Callable[[J], T],
    *,
    depth: int = 2,
    threads: int = 1,
    while_waiting: Callable[[], None] = lambda: None,
) -> Iterator[T]:
    """`make(job)` of each job, in order, made in threads: `depth` ready ahead, one in hand.

    An exception in `make` is raised when its item is taken.

    Args:
        while_waiting: called every second in which an item is waited for.
    """

    def taken(item: Future[T]) -> T:
        while concurrent.futures.wait([item], timeout=1.0).not_done:
            while_waiting()
        return item.result()

    with ThreadPoolExecutor(max_workers=threads) as pool:
        ahead: deque[Future[T]] = deque()
        try:
            for job in jobs:
                ahead.append(pool.submit(make, job))
                if len(ahead) > depth:
                    yield taken(ahead.popleft())
            while ahead:
                yield taken(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def micro_batches(
    dataset: Dataset,
    samples: list[Sample],
    *,
    rank: int,
    num_ranks: int,
    micro_tokens: int,
    num_steps: int,
    pin: bool = False,
    blocks: bool = True,
) -> list[Batch]:
    """This rank's micro-batches of one step's samples, each with its plan.

    A rank without a sample gets one of another rank, in which no token counts, because ranks that
    share weights meet in every micro-batch.
    """
    followed = dataset.followed
    with followed.ending_waits() if followed else contextlib.nullcontext():
        if followed:  # ranks that wait for a shard wait for it together
            followed.keep(samples)
        parts = split_step(samples, num_ranks=num_ranks, micro_tokens=micro_tokens)[rank]
        batches = [
            dataset.batch(part) if part else dataset.batch(samples[:1]).silent() for part in parts
        ]
    planned = [batch.planned(num_steps, blocks=blocks) for batch in batches]
    return [batch.pinned() for batch in planned] if pin else planned


def on_device(steps: Iterator[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The micro-batches of each step on `device`, copied one step ahead."""
    if device.type != "cuda":
        for batches in steps:
            yield [batch.to(device) for batch in batches]
        return
    stream = torch.cuda.Stream(device)
    waiting: deque[tuple[list[Batch], torch.cuda.Event]] = deque()
    for batches in steps:
        with torch.cuda.stream(stream):
            waiting.append(([batch.to(device) for batch in batches], stream.record_event()))
        if len(waiting) > 1:
            yield _taken(*waiting.popleft())
    while waiting:
        yield _taken(*waiting.popleft())


def _taken(batches: list[Batch], copied: torch.cuda.Event) -> list[Batch]:
    """The batches for use on the current stream, once they are copied."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for batch in batches:
        batch.on_stream(current)
    return batches
