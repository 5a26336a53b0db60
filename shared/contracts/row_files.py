# SPDX-License-Identifier: Apache-2.0
"""Hidden states with one file per conversation: the layout `samples`, and NVIDIA ModelOpt's.

    samples:   {input_ids long [S], hidden_states list of A+1 [S, H], loss_mask long [S]}
               fp8: the aux layers float8 [S, H], and scales bfloat16 [S, A]
    ModelOpt:  {input_ids [S], hidden_states [S, H], aux_hidden_states [S, A*H], loss_mask [S]}

Only ids and mask stay in memory; the states are mapped from the file for each batch.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.contracts import fp8
from shared.io.tensor_files import is_dense, load_tensors, wrong


@dataclasses.dataclass(frozen=True)
class RowFile:
    """One file, with the interface of a shard of one sample."""

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
        """[S, A+1, H] bfloat16, read at each call: aux layers in order, then the final one."""
        raw = self._load()
        parts = raw["hidden_states"]
        if "aux_hidden_states" in raw:
            aux = raw["aux_hidden_states"].unflatten(1, (self.num_states - 1, self.hidden_size))
            parts = [*aux.unbind(1), parts]
        if "scales" in raw:
            pairs = zip(parts[:-1], raw["scales"].unbind(1), strict=True)
            parts = [*(fp8.decode(values, scales) for values, scales in pairs), parts[-1]]
        return torch.stack([part.to(torch.bfloat16) for part in parts], dim=1)

    def final(self) -> Tensor:
        """The final states [S, H] bfloat16."""
        return self.hidden_states[:, -1]

    def states(self, rows: slice) -> Tensor:
        """The states of `rows`, which are all of them."""
        return self.hidden_states[rows]

    def rows(self, index: int) -> slice:
        return slice(0, len(self.input_ids))

    def _load(self) -> dict[str, Any]:
        label, remedy = "one conversation's states", "Restore the file, or make the states again."
        raw = load_tensors(self.path, label=label, remedy=remedy)
        try:
            self._check(raw)
        except ValueError as error:
            raise wrong(self.path, error, label=label, remedy=remedy) from error
        checked: dict[str, Any] = raw
        return checked

    def _check(self, raw: Any) -> None:
        if not isinstance(raw, dict):
            raise ValueError(f"expected a dict, found {type(raw).__name__}")
        for name in ("input_ids", "loss_mask"):
            tensor = raw.get(name)
            if not is_dense(tensor) or tensor.dim() != 1 or tensor.is_complex():
                found = list(tensor.shape) if is_dense(tensor) else type(tensor).__name__
                raise ValueError(f"{name}: expected a row of numbers, found {found}")
        if "hidden_states" not in raw:
            raise ValueError(f"expected hidden_states, found {', '.join(map(str, raw))}")
        ids = raw["input_ids"]
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"input_ids: expected whole numbers, found {ids.dtype}")
        if bool((ids != ids.to(torch.int32)).any()):
            raise ValueError("input_ids: expected 32-bit numbers")
        tokens = len(ids)
        if tokens == 0 or raw["loss_mask"].shape != (tokens,):
            raise ValueError(f"loss_mask {list(raw['loss_mask'].shape)} for {tokens} input_ids")
        mask = raw["loss_mask"]
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("loss_mask: expected only 0 and 1")
        size = self.hidden_size
        shapes = _shapes(raw.get("hidden_states"))
        expected = [[tokens, size]] * self.num_states
        if "aux_hidden_states" in raw:
            shapes = [*_shapes(raw["aux_hidden_states"]), *shapes]
            expected = [[tokens, (self.num_states - 1) * size], [tokens, size]]
        if shapes != expected:
            raise ValueError(f"states: expected the shapes {expected}, found {shapes}")
        self._check_scales(raw, tokens)

    def _check_scales(self, raw: dict[str, Any], tokens: int) -> None:
        parts = raw["hidden_states"] if isinstance(raw["hidden_states"], list) else []
        are_fp8 = [part.dtype == fp8.DTYPE for part in parts]
        if "scales" not in raw and not any(are_fp8):
            return
        scales, shape = raw.get("scales"), (tokens, self.num_states - 1)
        if not is_dense(scales, torch.bfloat16) or scales.shape != shape:
            raise ValueError(f"scales: expected bfloat16 {list(shape)} beside float8 states")
        if are_fp8 != [True] * (self.num_states - 1) + [False]:
            raise ValueError("scales: expected float8 for the aux layers, not for the final state")


def _shapes(tensors: Any) -> list[list[int]]:
    listed = tensors if isinstance(tensors, list) else [tensors]
    if not all(is_dense(tensor) and tensor.is_floating_point() for tensor in listed):
        raise ValueError("states: expected tensors of real numbers")
    return [list(tensor.shape) for tensor in listed]
