# SPDX-License-Identifier: Apache-2.0
"""What this machine has: GPUs, memory, shared memory. No torch, no driver library."""

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
DEVICES = "CUDA_VISIBLE_DEVICES"


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
    return Machine(_gpus(memory_bytes), memory_bytes, shutil.disk_usage(SHARED_MEMORY).free)


def _gpus(memory_bytes: int) -> tuple[tuple[str, int], ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order."""
    gpus = []
    for line in _query("name,memory.total"):
        name, _, size = line.rpartition(",")
        # Where GPU and processor share one memory, nvidia-smi reports [N/A].
        size_bytes = int(size) << 20 if size.strip().isdecimal() else memory_bytes
        gpus.append((name.strip(), size_bytes))
    return tuple(gpus[index] for index in _visible(len(gpus)))


def _query(fields: str) -> list[str]:
    """nvidia-smi's answer, one line for each GPU; none where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in map(str.strip, done.stdout.splitlines()) if line]


def _visible(count: int) -> list[int]:
    """The GPUs that CUDA would use: by index or by the start of a UUID, up to the first unknown one.

    A part of a GPU (MIG) counts as GPU 0: nvidia-smi's query does not list parts.
    """
    if DEVICES not in os.environ or count == 0:
        return list(range(count))
    names = [name.strip() for name in os.environ[DEVICES].split(",") if name.strip()]
    uuids = [] if all(map(str.isdecimal, names)) else _query("uuid")
    chosen: list[int] = []
    for name in names:
        if name.isdecimal():
            found = [int(name)] if int(name) < count else []
        elif name.startswith("MIG-"):
            found = [0]
        else:
            found = [index for index, uuid in enumerate(uuids) if uuid.startswith(name)]
        if not found:
            break
        chosen.append(found[0])
    return chosen


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
