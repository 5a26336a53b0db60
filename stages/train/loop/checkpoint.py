# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training: `checkpoints/step_00000100.pt`, and links `latest.pt` and `best.pt`.

A checkpoint has the fp32 weights, optimizer, scheduler, step and random state; the step is the
position in the data. Its tensors are not sharded, so any number of ranks can resume. On a CPU with
the same number of threads, a resumed training gives bit-identical weights.

The state is copied at once (`staging`) and a thread writes it while training goes on.
"""

import concurrent.futures
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io import files
from shared.io.tensor_files import load_tensors, save_tensors
from stages.train.loop.staging import Staged, Staging

LATEST, BEST = "latest.pt", "best.pt"
_KEYS = {"step", "weights", "optimizer", "scheduler", "rng", "best", "sums"}


class Checkpoints:
    """The checkpoints in `folder`: the newest `keep`, and the best."""

    def __init__(
        self, folder: Path, *, keep: int, on_saved: Callable[[int], None] = lambda _: None
    ) -> None:
        self.folder = folder
        self._on_saved = on_saved  # called with the step of a checkpoint that is on the disk
        self.keep = keep
        self._written_step = -1
        self._saved_s = time.monotonic()
        self._staging = Staging()
        self._writer = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._writing: concurrent.futures.Future[None] | None = None
        files.sweep_temporaries(folder)

    def save(self, state: dict[str, Any], *, best: bool = False) -> None:
        """Save a copy of `state` as the latest checkpoint, and as the best one if `best`."""
        self.wait()  # at most one copy in memory
        self._writing = self._writer.submit(self._write, self._staging.copied(state), best)
        self._saved_s = time.monotonic()

    def age_s(self) -> float:
        """Seconds since the last save, or since the start."""
        return time.monotonic() - self._saved_s

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            UserError: it could not be written.
        """
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, staged: Staged, best: bool) -> None:
        state = staged.wait()
        path = self.folder / _name(state["step"])
        # The best state is often the latest one too: two links, one file.
        if state["step"] != self._written_step:
            save_tensors(path, state)
            self._written_step = state["step"]
        # First the best one: after a kill at any moment, the best step that `latest` states exists.
        for name in (BEST, LATEST) if best else (LATEST,):
            files.write_link(self.folder / name, path.name)
        with files.writing(self.folder):
            self._prune()
        self._on_saved(state["step"])

    def _prune(self) -> None:
        linked = {(self.folder / name).resolve().name for name in (LATEST, BEST)}
        states = sorted(self.folder.glob("step_*.pt"))
        for path in states[: -self.keep]:
            if path.name not in linked:
                path.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any] | None:
    """The state in the file, or None if there is no file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    remedy = (
        f"Link it to an older checkpoint in its folder ({_names(path.parent)}), or delete it to train "
        "from the start."
    )
    state = load_tensors(path, label="a checkpoint", remedy=remedy, mmap=False)
    kinds = {"step": int, "weights": dict, "optimizer": dict, "scheduler": dict}
    if not isinstance(state, dict) or not state.keys() >= _KEYS:
        raise _not_a_checkpoint(path, f"the keys {sorted(_KEYS)}", remedy)
    for name, kind in kinds.items():
        if not isinstance(state[name], kind):
            raise _not_a_checkpoint(path, f"{name} of type {kind.__name__}", remedy)
    return state


def _not_a_checkpoint(path: Path, expected: str, remedy: str) -> UserError:
    return UserError(
        f"{path}: expected a checkpoint with {expected}.",
        code="checkpoint-content",
        remedy=remedy,
        facts={"file": str(path)},
    )


def restore_best(folder: Path, state: dict[str, Any]) -> None:
    """Point the link `best.pt` to the best checkpoint that `state` knows.

    After a crash between the two link updates it may point to a newer checkpoint, which is evaluated
    again.

    Raises:
        UserError: that checkpoint is gone, so there would be nothing to export.
    """
    name = _name(int(state["best"]["step"]))
    if (folder / name).exists():
        files.write_link(folder / BEST, name)
    elif state["best"]["step"] > 0 and not (folder / BEST).exists():
        raise UserError(
            f"{folder / BEST}: expected the checkpoint of step {state['best']['step']:.0f}, the best "
            "so far, found none.",
            code="checkpoint-best-missing",
            remedy=f"Restore it, or delete {folder / LATEST} to train from the start.",
            facts={"step": int(state["best"]["step"])},
        )


def _name(step: int) -> str:
    return f"step_{step:08d}.pt"


def _names(folder: Path) -> str:
    return ", ".join(path.name for path in sorted(folder.glob("step_*.pt"))) or "there are none"
