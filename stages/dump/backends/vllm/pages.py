# SPDX-License-Identifier: Apache-2.0
"""Finished requests' states, out of the paged cache into host memory.

On a GPU they pass through two fixed buffers, taken in turn: a chunk is gathered into one on the
engine's stream while the other is measured and copied to pinned memory on a side stream. So a row of
any length needs memory that is known when the engine starts, and the engine waits for gathers alone
(for a copy too, where both buffers are full). A CPU takes the same path without streams. The copy on
a GPU's side stream has not been run: the machines that the tests run on have none.

Pages are zeroed once read. Should a step ever skip the capture (vLLM does so for a batch in which a
row fills its length limit), the reader finds zeros and refuses them, instead of an earlier request's
states, which would look perfectly sound.

Shapes: T tokens of one request, A+1 aux layers and the final state, H hidden.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

# The order of a page's axes changed between the releases that we support; this function knows the
# installed one's. Nothing else of vLLM's own (debugging) connector is used.
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    extract_from_kv_cache,
)

from stages.dump.backends.stats import Stats, measure

BUFFER_BYTES = 32 << 20


@dataclasses.dataclass
class Taken:
    """A row on its way to the host.

    Attributes:
        states: [T, A+1, H] bf16 on the host.
        stats: of the states, on the host.
        arrived: on a GPU, the event after which both may be read.
    """

    states: torch.Tensor
    stats: Stats
    arrived: "torch.cuda.Event | None"

    def wait(self) -> None:
        """Return once `states` and `stats` may be read."""
        if self.arrived is not None:
            self.arrived.synchronize()


@dataclasses.dataclass
class _Buffer:
    """One fixed buffer [chunk, A+1, H] bf16 on the GPU, and the event that says it is free again."""

    states: torch.Tensor
    is_free: "torch.cuda.Event"


class PageReader:
    """Reads the pages of finished requests. Made once, when the engine shows its cache.

    Args:
        cache: the engine's cache of hidden states, [pages, ...].
        block_size: tokens of a page.
        chunk_tokens: tokens that are copied at once; as many as BUFFER_BYTES hold by default.
    """

    def __init__(
        self, cache: torch.Tensor, block_size: int, *, chunk_tokens: int | None = None
    ) -> None:
        self._cache = cache
        self._block_size = block_size
        slot = torch.zeros(1, dtype=torch.long, device=cache.device)
        self._shape = extract_from_kv_cache(cache, slot, 1).shape[1:]  # [A+1, H]
        token_bytes = self._shape.numel() * torch.bfloat16.itemsize
        self._chunk_tokens = chunk_tokens or max(1, BUFFER_BYTES // token_bytes)
        self._buffers: list[_Buffer] = []
        if cache.is_cuda:
            self._side_stream = torch.cuda.Stream(cache.device)
            size = (self._chunk_tokens, *self._shape)
            self._buffers = [
                _Buffer(
                    torch.empty(size, dtype=torch.bfloat16, device=cache.device), torch.cuda.Event()
                )
                for _ in range(2)
            ]

    def take(self, block_ids: list[int], num_tokens: int) -> Taken:
        """Copy the first `num_tokens` states out of the pages `block_ids` and zero the pages.

        The reads run in the order of the engine's stream, so the pages may be reused as soon as
        this returns.

        Worked example: 16 tokens a page, pages [7, 3], T = 18: tokens 0..15 are slots 112..127,
        tokens 16 and 17 are slots 48 and 49.
        """
        is_cuda = self._cache.is_cuda
        blocks = torch.tensor(block_ids, dtype=torch.long, pin_memory=is_cuda)
        blocks = blocks.to(self._cache.device, non_blocking=True)
        tokens = torch.arange(num_tokens, device=self._cache.device)
        slots = blocks[tokens // self._block_size] * self._block_size + tokens % self._block_size
        states = torch.empty((num_tokens, *self._shape), dtype=torch.bfloat16, pin_memory=is_cuda)
        stats = first = None
        for number, start in enumerate(range(0, num_tokens, self._chunk_tokens)):
            chunk = slots[start : start + self._chunk_tokens]
            with self._gathered(number, chunk) as part:  # [chunk, A+1, H]
                states[start : start + len(chunk)].copy_(part, non_blocking=True)
                first = part[0].clone() if first is None else first
                found = measure(part, first)
                stats = found if stats is None else stats.joined(found)
        self._cache.index_fill_(0, blocks, 0)
        if stats is None:
            raise ValueError("expected a request of at least one token, found none")
        return self._sent(states, stats)

    @contextlib.contextmanager
    def _gathered(self, number: int, slots: torch.Tensor) -> Iterator[torch.Tensor]:
        """The states at `slots`; on a GPU the block runs on the side stream."""
        states = extract_from_kv_cache(self._cache, slots, len(slots)).to(torch.bfloat16)
        if not self._buffers:
            yield states
            return
        buffer = self._buffers[number % 2]
        engine = torch.cuda.current_stream(self._cache.device)
        engine.wait_event(buffer.is_free)
        part = buffer.states[: len(slots)].copy_(states)
        self._side_stream.wait_stream(engine)
        with torch.cuda.stream(self._side_stream):
            yield part
            buffer.is_free.record(self._side_stream)

    def _sent(self, states: torch.Tensor, stats: Stats) -> Taken:
        """The row with its stats on their way to the host too."""
        if not self._buffers:
            return Taken(states, stats, None)
        with torch.cuda.stream(self._side_stream):
            pinned = [torch.empty_like(t, device="cpu", pin_memory=True) for t in stats]
            for target, source in zip(pinned, stats, strict=True):
                target.copy_(source, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._side_stream)
        return Taken(states, Stats(*pinned), arrived)
