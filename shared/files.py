# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all: written beside their final name, fsynced, renamed.

A reader never sees half a file, whatever killed the writer. What a killed writer leaves behind is
named `.<name>.tmp-<host>-<pid>` and is swept by the next writer of the same folder.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import UserError


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    # Processes in containers of their own, with like process ids, may write into one folder.
    return path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; when the block ends well it becomes `path`.

    The block may create a file of its own making at that name (Parquet, torch.save).

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"could not write {path}: {error.strerror or error}. "
            "Free some space or make the workspace writable, then run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON (sorted by nobody: the order given is the order read)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON; the message names it and the place.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"expected a file at {path}, found none.") from error
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror or error}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Restore or delete it.") from error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sweep_temporaries(folder: Path, *, idle_s: float = 0.0) -> None:
    """Delete what a killed writer left below `folder` and nobody has touched for `idle_s`."""
    if folder.is_dir():
        for leftover in list(folder.rglob(".*.tmp-*")):
            with contextlib.suppress(
                FileNotFoundError
            ):  # its writer may be alive, and done with it
                if time.time() - leftover.stat().st_mtime < idle_s:
                    continue
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; when the block ends well it replaces `path`.

    An older `path` is moved aside first and deleted last, so that at every moment one whole
    folder, the old or the new, exists on disk.
    """
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for item in temporary.rglob("*"):
            if item.is_file():
                with item.open("rb+") as handle:
                    os.fsync(handle.fileno())
        previous = temporary.with_name(f"{temporary.name}-previous")
        if path.exists():
            path.replace(previous)
        temporary.replace(path)
        _fsync_folder(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
