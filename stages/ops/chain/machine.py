# SPDX-License-Identifier: Apache-2.0
"""What this machine has: GPUs, memory, shared memory. No torch, no driver library."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_QUERY = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine that the stages would run on.

    Attributes:
        gpus: (name, bytes of memory) of each; none where nvidia-smi finds none.
        memory_bytes: what a new process could have of the main memory.
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
    return Machine(_gpus(), _available_bytes(), shutil.disk_usage(SHARED_MEMORY).free)


def _gpus() -> tuple[tuple[str, int], ...]:
    try:
        told = subprocess.run(_QUERY, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = (line.rsplit(",", 1) for line in told.splitlines() if "," in line)
    return tuple((name.strip(), int(mebibytes) << 20) for name, mebibytes in rows)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
