# SPDX-License-Identifier: Apache-2.0
"""Is the host idle before an engine is started? GPUs are not looked at.

In: `/proc/stat`, twice. Out: the share of this process's cores that others keep busy. Cost: one second.
"""

import os
import time
from collections.abc import Collection
from pathlib import Path

_LOOK_S = 1.0
_IDLE = (3, 4)  # columns of /proc/stat: idle, and waiting for a disk


def busy_share() -> float:
    """Share (0 to 1) of the cores that this process may use that is busy while it sleeps."""
    cores, stat = os.sched_getaffinity(0), Path("/proc/stat")
    before = ticks(stat.read_text(encoding="ascii"), cores)
    time.sleep(_LOOK_S)
    after = ticks(stat.read_text(encoding="ascii"), cores)
    busy, whole = (now - then for now, then in zip(after, before, strict=True))
    return busy / whole if whole > 0 else 0.0


def ticks(stat: str, cores: Collection[int]) -> tuple[int, int]:
    """(busy, all) ticks of some cores since the machine started.

    Worked example, core 1 of `cpu1 5 1 2 80 10 0 1 1 0 0`: 10 busy, 100 in all.
    """
    busy = whole = 0
    for line in stat.splitlines():
        name, *columns = line.split() or [""]
        if name in {f"cpu{core}" for core in cores}:
            counts = [int(column) for column in columns[:8]]  # guests are among the user's
            whole += sum(counts)
            busy += sum(count for column, count in enumerate(counts) if column not in _IDLE)
    return busy, whole
