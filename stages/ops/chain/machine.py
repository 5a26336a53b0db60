# SPDX-License-Identifier: Apache-2.0
"""What this machine has: GPUs, memory, shared memory. No torch, no driver library."""

import dataclasses
import shutil
from pathlib import Path

from shared.runtime.gpus import visible_gpus

SHARED_MEMORY = Path("/dev/shm")


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine that the stages would run on.

    Attributes:
        gpus: (name, bytes of memory) of each GPU that a process may use; empty without nvidia-smi.
        memory_bytes: main memory that a new process could get.
        shared_bytes: what is free in /dev/shm.
    """

    gpus: tuple[tuple[str, int], ...]
    memory_bytes: int
    shared_bytes: int

    @property
    def least_gpu_bytes(self) -> int:
        return min(size for _, size in self.gpus)

    def __str__(self) -> str:
        if not self.gpus:
            return f"CPU, {self.memory_bytes / 2**30:.1f} GiB of memory"
        name = self.gpus[0][0]
        return f"{len(self.gpus)} x {name}, {self.least_gpu_bytes / 2**30:.0f} GiB each"


def look() -> Machine:
    """This machine, now."""
    memory_bytes = _available_bytes()
    gpus = tuple((name, memory_bytes if size is None else size) for name, size in visible_gpus())
    return Machine(gpus, memory_bytes, shutil.disk_usage(SHARED_MEMORY).free)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
