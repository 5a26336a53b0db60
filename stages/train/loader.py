# SPDX-License-Identifier: Apache-2.0
"""Batches are made in a thread, ahead of the step that takes them.

The states are mapped from files, so making a batch is what reads the disk. For a GPU the batch is
put into page-locked memory, and its copy to the device runs behind the step before.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from stages.train.data import Batch, Dataset, Sample, split_step

T = TypeVar("T")


class _End:
    """The last item of the queue, with the error that ended the thread, if one did."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetched(items: Iterator[T], *, depth: int = 2) -> Iterator[T]:
    """The same items in the same order, made in a thread that runs at most `depth` ahead."""
    ready: queue.Queue[T | _End] = queue.Queue(depth)
    stopped = threading.Event()

    def give(item: T | _End) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                give(item)
                if stopped.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised again where the items are taken
            give(_End(error))
        else:
            give(_End(None))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        thread.join()


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
