# SPDX-License-Identifier: Apache-2.0
"""Copies of a training's state in main memory, which a thread writes while training goes on.

In: nested dicts and lists of tensors, on any device. Out: the same with tensors in buffers of main
memory, which are kept for the next copy. Cost: 12 bytes a trained weight of main memory, page-locked
for a GPU.

From a GPU the copies are only queued, on the stream that computes: the loop does not wait for them, and
the step that comes next changes nothing before it is copied.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Staged:
    """A copy on its way to main memory.

    Attributes:
        arrived: on a GPU, the event after which `state` may be read.
    """

    state: dict[str, Any]
    arrived: "torch.cuda.Event | None"

    def wait(self) -> dict[str, Any]:
        """The state, once it is whole."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.state


class Staging:
    """Buffers for one state; the next copy overwrites the one before."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def copied(self, state: dict[str, Any]) -> Staged:
        """A copy of `state` as it is when the current stream gets there."""
        copy = self._copy(state, ())
        is_queued = any(buffer.is_pinned() for buffer in self._buffers.values())
        return Staged(copy, torch.cuda.current_stream().record_event() if is_queued else None)

    def _copy(self, value: Any, place: tuple[Any, ...]) -> Any:
        """`value` with copies of its tensors; `place` is the keys that lead to it."""
        if isinstance(value, Tensor):
            return self._buffer(value, place).copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._copy(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(x, (*place, i)) for i, x in enumerate(value))
        return value

    def _buffer(self, value: Tensor, place: tuple[Any, ...]) -> Tensor:
        found = self._buffers.get(place)
        if found is None or found.shape != value.shape or found.dtype != value.dtype:
            # A copy to memory that is not page-locked would wait for the GPU.
            found = torch.empty(
                value.shape, dtype=value.dtype, device="cpu", pin_memory=value.is_cuda
            )
            self._buffers[place] = found
        return found
