# SPDX-License-Identifier: Apache-2.0
"""Resumable states of a training, each whole: `checkpoints/step_00000100.pt` and two links.

fp32 weights, optimizer, scheduler, step and the random state; the data's position is the step
itself. `latest.pt` and `best.pt` are links to such files. The tensors are whole, whatever the number
of ranks, so another number resumes. Resuming on a CPU, with as many threads, gives the same weights
to the bit.

The state is copied at once and written by a thread, while training goes on.
"""

import concurrent.futures
from pathlib import Path
from typing import Any

import torch

from shared.errors import UserError
from shared.io import files
from shared.io.tensor_files import load_tensors, save_tensors

LATEST, BEST = "latest.pt", "best.pt"
_KEYS = {"step", "weights", "optimizer", "scheduler", "rng", "best", "sums"}


class Checkpoints:
    """The states in `folder`: the newest `keep` of them, and the best."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._written_step = -1
        self._writer = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._writing: concurrent.futures.Future[None] | None = None
        files.sweep_temporaries(folder)

    def save(self, state: dict[str, Any], *, best: bool = False) -> None:
        """Keep a copy of `state` as the latest one, and as the best one if it is."""
        self.wait()  # at most one copy waits in memory
        self._writing = self._writer.submit(self._write, _copied(state), best)

    def wait(self) -> None:
        """Return once everything saved is on disk.

        Raises:
            UserError: it could not be written.
        """
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, state: dict[str, Any], best: bool) -> None:
        path = self.folder / _name(state["step"])
        # A best state is often the latest one too: two names, one file.
        if state["step"] != self._written_step:
            save_tensors(path, state)
            self._written_step = state["step"]
        # The best one first: a latest one that names a best one finds it, whenever it is killed.
        for name in (BEST, LATEST) if best else (LATEST,):
            files.write_link(self.folder / name, path.name)
        with files.writing(self.folder):
            self._prune()

    def _prune(self) -> None:
        linked = {(self.folder / name).resolve().name for name in (LATEST, BEST)}
        states = sorted(self.folder.glob("step_*.pt"))
        for path in states[: -self.keep]:
            if path.name not in linked:
                path.unlink(missing_ok=True)


def _copied(value: Any) -> Any:
    """The same structure with tensors of its own on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def load(path: Path) -> dict[str, Any] | None:
    """The state, or None where there is none yet.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    remedy = (
        f"Link it to an older one beside it ({_names(path.parent)}), or delete it to train from "
        "the start."
    )
    state = load_tensors(path, label="a checkpoint", remedy=remedy, mmap=False)
    kinds = {"step": int, "weights": dict, "optimizer": dict, "scheduler": dict}
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise UserError(f"{path}: expected a checkpoint with {sorted(_KEYS)}. {remedy}")
    for name, kind in kinds.items():
        if not isinstance(state[name], kind):
            raise UserError(
                f"{path}: expected {name} to be of type {kind.__name__}, found "
                f"{type(state[name]).__name__}. {remedy}"
            )
    return state


def restore_best(folder: Path, state: dict[str, Any]) -> None:
    """Have the best link name the best checkpoint that `state` knows of.

    It names a later one after a kill between the two links; whether that one is the best is found
    out again.

    Raises:
        UserError: it is gone, so nothing could be exported in the end.
    """
    name = _name(int(state["best"]["step"]))
    if (folder / name).exists():
        files.write_link(folder / BEST, name)
    elif state["best"]["step"] > 0 and not (folder / BEST).exists():
        raise UserError(
            f"{folder / BEST}: expected the checkpoint of step {state['best']['step']:.0f}, the best "
            f"so far, found none. Restore it, or delete {folder / LATEST} to train from the start."
        )


def _name(step: int) -> str:
    return f"step_{step:08d}.pt"


def _names(folder: Path) -> str:
    return ", ".join(path.name for path in sorted(folder.glob("step_*.pt"))) or "there is none"
