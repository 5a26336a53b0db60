# SPDX-License-Identifier: Apache-2.0
"""Resumable state of a training: `checkpoints/latest.pt` and `checkpoints/best.pt`, each whole.

fp32 weights, optimiser, scheduler, step and the random state; the data's position is the step
itself. Resuming on a CPU gives the same weights to the bit.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

from shared.errors import UserError
from shared.files import atomic_path

_KEYS = {"step", "weights", "optimizer", "scheduler", "rng", "best"}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write the state, whole or not at all."""
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load(path: Path) -> dict[str, Any] | None:
    """The state, or None where there is none yet.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{path}: expected a checkpoint, found: {str(error).splitlines()[0]}. Delete it to train "
            "from the start."
        ) from error
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise UserError(f"{path}: expected a checkpoint with {sorted(_KEYS)}. Delete it.")
    return state
