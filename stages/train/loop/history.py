# SPDX-License-Identifier: Apache-2.0
"""Records of a training: history.jsonl and experiment trackers."""

import dataclasses
import json
import math
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shared.io import files


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Figures of a finished training."""

    samples: int
    held_out: int
    tokens: int
    steps: int
    best_step: int
    walked_acceptance_length: float | None
    final_loss: float
    seconds: float
    mixed_precision: str

    def facts(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class History:
    """One JSON line per record in `path`, and the same to the trackers; rank 0 alone writes."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self.accelerator = accelerator
        self._lines: list[str] = []

    def append(self, step: int, record: dict[str, Any]) -> None:
        """Add a record.

        Raises:
            UserError: the disk is full or the folder is not writable.
        """
        if not self.accelerator.is_main_process:
            return
        line = json.dumps({"step": step, **record})
        if not self.path.exists():  # somebody removed it
            self._write()
        self._lines.append(line)
        with files.writing(self.path), self.path.open("a", encoding="utf-8") as history:
            history.write(line + "\n")
        scalars: dict[str, float] = {}
        for name, value in record.items():
            if isinstance(value, list):
                scalars |= {f"{name}_{index}": item for index, item in enumerate(value)}
            else:
                scalars[name] = value
        self.accelerator.log(scalars, step=step)

    def keep(self, last_step: int) -> None:
        """Drop the records after `last_step`: a resumed run repeats those steps."""
        if not self.accelerator.is_main_process:
            return
        lines = files.read_text(self.path).splitlines() if self.path.exists() else []
        self._lines = [line for line in lines if _step_of(line) <= last_step]
        self._write()

    def _write(self) -> None:
        files.write_text(self.path, "".join(line + "\n" for line in self._lines))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf  # a line that a kill cut off


def progress_figures(
    loss: float, accuracy: Sequence[float], walked: float, speed: float, device: torch.device
) -> dict[str, str]:
    """The progress line's figures; what is not measured yet is left out."""
    figures = {"tokens_per_s": f"{speed:.0f}"}
    if math.isfinite(loss):
        figures["loss"] = f"{loss:.4f}"
    if accuracy:
        figures["accuracy"] = "/".join(f"{share:.2f}" for share in accuracy)
    if math.isfinite(walked):
        figures["walked_al"] = f"{walked:.3f}"
    return {**figures, "memory_gib": f"{peak_memory_gib(device):.1f}"}


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process on its device, in GiB, without mapped files: the kernel may drop those."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # On a CPU freed memory stays with the process, so what it has now is its peak.
    resident, mapped = Path("/proc/self/statm").read_text(encoding="ascii").split()[1:3]
    return (int(resident) - int(mapped)) * resource.getpagesize() / 2**30
