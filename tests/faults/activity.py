# SPDX-License-Identifier: Apache-2.0
"""When a stage writes: the changes below its folders, counted by looking again and again.

Most of a short run is imports. A moment that is drawn among its changes falls where files are made,
renamed and removed, which is where a fault can do harm.
"""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_POLL_S = 0.001


def _listing(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of everything below `folder`."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # renamed while it was looked at
                found.append((entry.path, entry.stat(follow_symlinks=False).st_size))
                if entry.is_dir(follow_symlinks=False):
                    found += _listing(Path(entry.path))
    return found


class Activity:
    """How often what lies below some folders has changed so far."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.changes = 0
        self._last = self._look()

    def _look(self) -> list[tuple[str, int]]:
        return sorted(item for folder in self.folders for item in _listing(folder))

    def watch(self, ended: Callable[[], bool], *, until: int | None = None) -> bool:
        """Count until `until` changes were seen (True), or the process has ended (False)."""
        while until is None or self.changes < until:
            if ended():
                return False
            now = self._look()
            if now != self._last:
                self.changes, self._last = self.changes + 1, now
            else:
                time.sleep(_POLL_S)
        return True
