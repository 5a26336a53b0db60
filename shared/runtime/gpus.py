# SPDX-License-Identifier: Apache-2.0
"""The GPUs that a process of this machine may use, as nvidia-smi tells them: no torch, no CUDA context."""

import itertools
import os
import subprocess
from collections.abc import Mapping

DEVICES = "CUDA_VISIBLE_DEVICES"


def listed_devices(environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """The names in CUDA_VISIBLE_DEVICES; None where it is not set, and every GPU may be used.

    As CUDA reads it, an empty entry or -1 ends the list.
    """
    if DEVICES not in environment:
        return None
    names = [name.strip() for name in environment[DEVICES].split(",")]
    return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))


def visible_gpus() -> list[tuple[str, int | None]]:
    """(name, bytes of memory) of each GPU that CUDA_VISIBLE_DEVICES leaves, in its order.

    Empty without nvidia-smi. The bytes are None where GPU and processor share one memory.
    """
    gpus: list[tuple[str, int | None]] = []
    for line in _query("name,memory.total"):
        name, _, size = line.rpartition(",")
        is_known = size.strip().isdecimal()  # else nvidia-smi reports [N/A]
        gpus.append((name.strip(), int(size) << 20 if is_known else None))
    return [gpus[index] for index in _visible(len(gpus))]


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
    names = listed_devices()
    if names is None or count == 0:
        return list(range(count))
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
