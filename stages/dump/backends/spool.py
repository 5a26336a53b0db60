# SPDX-License-Identifier: Apache-2.0
"""The spool: a private folder through which the engine's processes hand states over, file by file.

It lies in /dev/shm where that has room (no disk is touched), else on a disk. A spool that a killed
run left behind holds memory; the next run finds its lock free and removes it.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from shared.errors import UserError

# Suffix of an empty file that means: the states could not be written.
FAILED_SUFFIX = ".failed"
STATES_SUFFIX = ".safetensors"
SHM = Path("/dev/shm")
# What vLLM's own queues need there.
SHM_RESERVE_BYTES = 256 << 20
SPOOL_PREFIX = "eyrie-spool-"
# A spool younger than this may not have its lock yet; do not take it for abandoned.
SPOOL_GRACE_S = 60.0


@contextlib.contextmanager
def open_spool(parents: Sequence[Path], *, needed_bytes: int, sharers: int = 1) -> Iterator[Path]:
    """A private folder in the first of `parents` with room, gone at the end.

    Spools that a killed run left behind are removed first: in /dev/shm they hold memory.

    Args:
        sharers: engines of this node that start together. Each sees the others' room as free until
            they fill it, so /dev/shm must have room for all of them.

    Raises:
        UserError: none has room, or the one that has cannot be written.
    """
    for parent in parents:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        needed = needed_bytes
        if parent == SHM:
            needed = needed_bytes * sharers + SHM_RESERVE_BYTES
        if shutil.disk_usage(parent).free >= needed:
            break
    else:
        raise UserError(
            f"expected {needed_bytes >> 20} MiB free for hidden states in flight, found less in "
            f"{' and '.join(map(str, parents))}.",
            code="spool-too-small",
            remedy="Free some space there, or lower dump.batch_tokens.",
            facts={"needed_bytes": needed_bytes, "folders": [str(parent) for parent in parents]},
        )
    try:
        # mkdtemp makes it 0700: prompts lie there in clear.
        spool = Path(tempfile.mkdtemp(prefix=SPOOL_PREFIX, dir=parent))
    except OSError as error:
        raise UserError(
            f"could not write to {parent} as user {os.getuid()}: {error.strerror}.",
            code="spool-not-writable",
            remedy="Make it writable for that user; a volume over /dev/shm must be writable for all.",
            facts={"folder": str(parent), "user": os.getuid()},
        ) from error
    lock = os.open(spool, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield spool
    finally:
        shutil.rmtree(spool, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove the spools whose lock nobody holds; a process id means nothing across containers."""
    for spool in parent.glob(f"{SPOOL_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - spool.stat().st_mtime < SPOOL_GRACE_S:
                continue
            lock = os.open(spool, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(spool)
            finally:
                os.close(lock)
