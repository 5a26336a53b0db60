# SPDX-License-Identifier: Apache-2.0
"""An artifact's folder before it is complete: what it was to become, and how it is emptied.

`identity.json` is written first, so that a half-made folder knows its configuration. A folder that
is being emptied says so in the same place: what is left of it is nobody's work.
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io import files
from shared.io.records import Shape, read_record

IDENTITY = "identity.json"
LOCK = ".lock"  # every lock file's name begins so
# What costs nothing to make again: another configuration may take its place without being told to.
_NO_WORK = {IDENTITY, "rejects.jsonl", "plan"}


def started_identity(folder: Path) -> dict[str, Any] | None:
    """The identity that `folder` was begun with, or None where nothing was begun.

    Raises:
        UserError: it is there and cannot be understood.
    """
    path = folder / IDENTITY
    if not path.exists():
        return None
    return read_record(path, Shape, remedy=f"Delete {folder} to start anew.")


def holds_work(folder: Path) -> bool:
    """Whether anything lies here that a new configuration would lose."""
    return any(
        path.name not in _NO_WORK and not path.name.startswith(LOCK) for path in folder.iterdir()
    )


def clear_unfinished(folder: Path) -> None:
    """Empty a folder that has no manifest, but for its locks."""
    # The identity goes last, and says so: what is left must not be taken for another
    # configuration's work, nor for this one's.
    if holds_work(folder):
        with contextlib.suppress(UserError):  # a full disk, which this is to empty
            was = started_identity(folder) or {}
            files.write_json(folder / IDENTITY, {**was, "overwrite": "begun"})
    for item in folder.iterdir():
        if item.name == IDENTITY or item.name.startswith(LOCK):
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()
    (folder / IDENTITY).unlink(missing_ok=True)
