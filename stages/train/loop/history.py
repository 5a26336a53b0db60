# SPDX-License-Identifier: Apache-2.0
"""What a training says of itself on the way: history.jsonl, trackers, the progress line."""

import json
import math
import resource
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shared.io import files


class History:
    """One JSON line a record, in `path`, and the same to the trackers; written by rank 0 alone."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self.accelerator = accelerator
        self._lines: list[str] = []

    def append(self, step: int, record: dict[str, Any]) -> None:
        """Add a record.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        if not self.accelerator.is_main_process:
            return
        line = json.dumps({"step": step, **record})
        if not self.path.exists():  # somebody removed it: what it held is told again
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
        """Drop what a killed run recorded after its last checkpoint: those steps come again."""
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
    except (
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        RecursionError,
    ):  # the line that the kill cut
        return math.inf


def peak_memory_gib(device: torch.device) -> float:
    """The most that this process has held, on its device, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in KiB on Linux
