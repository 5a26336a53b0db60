# SPDX-License-Identifier: Apache-2.0
"""Threads that make batches ahead of the training step.

States are mapped from files, so making a batch reads the disk. For a GPU several threads fill
page-locked buffers, and a stream of its own copies them while the step before still runs.
"""

import concurrent.futures
import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from stages.train.data.batch import Batch
from stages.train.data.dataset import Dataset, Sample, split_step

LOADER_THREADS = 4  # for an accelerator; a CPU computes with its other threads
J = TypeVar("J")
T = TypeVar("T")


def loaded(
    jobs: Iterator[J],
    make: Callable[[J], list[Batch]],
    device: torch.device,
    *,
    while_waiting: Callable[[], None] = lambda: None,
) -> Iterator[list[Batch]]:
    """`make(job)` of each job, in order, on `device`: made in threads and copied ahead of their use."""
    threads = LOADER_THREADS if device.type == "cuda" else 1
    made = prefetched(jobs, make, depth=threads + 1, threads=threads, while_waiting=while_waiting)
    return on_device(made, device)


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
        return [
            ready(
                dataset, part or samples[:1], num_steps, is_silent=not part, pin=pin, blocks=blocks
            )
            for part in parts
        ]


def ready(
    dataset: Dataset,
    samples: Sequence[Sample],
    num_steps: int,
    *,
    is_silent: bool = False,
    pin: bool = False,
    blocks: bool = True,
) -> Batch:
    """The samples as one batch with its plan for `num_steps` TTT steps.

    Args:
        is_silent: let no token count.
        pin: into page-locked memory, from which a GPU copies without a wait.
        blocks: whether the plan needs attention's blocks.
    """
    batch = dataset.batch(samples, pin=pin)
    batch = (batch.silent() if is_silent else batch).planned(num_steps, blocks=blocks)
    return batch.pinned() if pin else batch


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
