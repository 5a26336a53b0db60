# SPDX-License-Identifier: Apache-2.0
"""One conversation a file: the layout `samples`, and NVIDIA ModelOpt's offline states.

    samples:   {input_ids long [S], hidden_states list of A+1 [S, H], loss_mask long [S]}
    ModelOpt:  {input_ids [S], hidden_states [S, H], aux_hidden_states [S, A*H], loss_mask [S]}

Only ids and mask are held; the states are mapped from the file where a batch asks for them.
"""

import dataclasses
import functools
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.errors import UserError


@dataclasses.dataclass(frozen=True)
class RowFile:
    """One file, with the face of a shard that holds one sample."""

    path: Path
    num_states: int  # A + 1
    hidden_size: int

    @property
    def sample_ids(self) -> list[str]:
        return [self.path.stem]

    @functools.cached_property
    def _small(self) -> tuple[Tensor, Tensor]:
        raw = self._load()
        return raw["input_ids"].to(torch.int32), raw["loss_mask"].to(torch.uint8)

    @property
    def input_ids(self) -> Tensor:
        """[S] int32."""
        return self._small[0]

    @property
    def loss_mask(self) -> Tensor:
        """[S] uint8."""
        return self._small[1]

    @property
    def hidden_states(self) -> Tensor:
        """[S, A+1, H] bfloat16, read anew each time: aux layers in order, then the final one."""
        raw = self._load()
        parts = raw["hidden_states"]
        if "aux_hidden_states" in raw:
            aux = raw["aux_hidden_states"].unflatten(1, (self.num_states - 1, self.hidden_size))
            parts = [*aux.unbind(1), parts]
        return torch.stack([part.to(torch.bfloat16) for part in parts], dim=1)

    def rows(self, index: int) -> slice:
        return slice(0, len(self.input_ids))

    def _load(self) -> dict[str, Any]:
        try:
            raw = torch.load(self.path, weights_only=True, mmap=True, map_location="cpu")
            self._check(raw)
        except (
            pickle.UnpicklingError,
            RuntimeError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            OSError,
            EOFError,
        ) as error:
            raise UserError(
                f"{self.path}: expected one conversation's states: {str(error).splitlines()[0]}. "
                "Restore the file, or make the states again."
            ) from error
        checked: dict[str, Any] = raw
        return checked

    def _check(self, raw: Any) -> None:
        tokens = len(raw["input_ids"])
        if tokens == 0 or raw["loss_mask"].shape != (tokens,):
            raise ValueError(f"loss_mask {list(raw['loss_mask'].shape)} for {tokens} input_ids")
        size = self.hidden_size
        found = _shapes(raw["hidden_states"])
        expected = [[tokens, size]] * self.num_states
        if "aux_hidden_states" in raw:
            found = [*_shapes(raw["aux_hidden_states"]), *found]
            expected = [[tokens, (self.num_states - 1) * size], [tokens, size]]
        if found != expected:
            raise ValueError(f"states: expected the shapes {expected}, found {found}")


def _shapes(tensors: Tensor | list[Tensor]) -> list[list[int]]:
    listed = [tensors] if isinstance(tensors, Tensor) else tensors
    return [list(tensor.shape) for tensor in listed]
