# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all: written beside their final name, fsynced, renamed.

A reader never sees half a file, whatever killed the writer. The leftover of a killed writer is
named `.<name>.tmp-<host>-<pid>` and is swept by the next writer of the same folder.
"""

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Far above any file of ours that is read whole.
_MAX_BYTES = 1 << 30


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    # Processes in containers of their own, with like process ids, may write into one folder.
    return path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")


def printable(text: object) -> str:
    r"""`text` on one line that every log and file can hold: other characters as escapes.

    They could steer a terminal or forge a line; and names of files are bytes, and need not be UTF-8.

    Worked example: ESC, "[31m", newline, "x" becomes r"\x1b[31m\nx".
    """
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(text))


def not_writable(path: Path, error: OSError) -> UserError:
    """The refusal of a path that cannot be written: the remedy follows from the error's number."""
    problem = f"could not write {path}: {error.strerror or error}."
    facts = {"path": str(path), "errno": error.errno}
    if error.errno in _NO_SPACE:
        remedy = (
            "Free some space on that disk, or raise the quota, then run the same command again."
        )
        return UserError(problem, code="no-space", remedy=remedy, facts=facts)
    return UserError(
        problem,
        code="not-writable",
        remedy=f"Make the workspace writable for user {os.getuid()}, group {os.getgid()}, then run the "
        "same command again.",
        facts=facts,
    )


def check_workspace(workspace: Path) -> None:
    """Refuse an empty workspace that cannot be written: docker makes one for a mistyped path.

    Raises:
        UserError: it is empty, and somebody else's.
    """
    if not workspace.is_dir() or os.access(workspace, os.W_OK) or any(workspace.iterdir()):
        return
    owner = workspace.stat()
    raise UserError(
        f"{workspace}: expected a workspace, found an empty folder of user {owner.st_uid} that user "
        f"{os.getuid()}, group {os.getgid()} cannot write in.",
        code="workspace-empty",
        remedy="Check EYRIE_WORKSPACE for a typing error: docker creates a path that does not exist, "
        "as root. If the path is right, make the folder writable for that user or group.",
        facts={"workspace": str(workspace), "owner": owner.st_uid, "user": os.getuid()},
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes `path`; what the operating system refuses becomes a user error.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise not_writable(path, error) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; when the block ends well it becomes `path`.

    The block may create a file of its own making at that name (Parquet, torch.save).

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = _temporary(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)  # a link that lies there must not be written through
            yield temporary
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
            _fsync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink(missing_ok=True)


def write_link(path: Path, name: str) -> None:
    """Have `path` be a link to `name` beside it, in one step from what it was before.

    Raises:
        UserError: the folder cannot be written.
    """
    temporary = _temporary(path)
    with writing(path):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(name)
        temporary.replace(path)
        _fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, its keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def unlink(folder: Path, *names: str) -> None:
    """Remove these files of a folder, as far as they are there.

    Raises:
        UserError: the folder cannot be written.
    """
    with writing(folder):
        for name in names:
            (folder / name).unlink(missing_ok=True)


def require_file(path: Path, *, max_bytes: int | None = None) -> None:
    """Refuse anything but a plain file, such as a folder, a pipe or a device.

    Raises:
        UserError: not a plain file, missing, or larger than `max_bytes`.
    """
    try:
        facts = path.stat()
    except FileNotFoundError as error:
        raise UserError(
            f"expected a file at {path}, found none.",
            code="file-missing",
            facts={"path": str(path)},
        ) from error
    except (OSError, ValueError) as error:  # a name too long, a loop of links; a NUL in it
        raise _unreadable(f"could not read {path}: {error}.") from error
    if not stat.S_ISREG(facts.st_mode):
        kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "a pipe or a device"
        raise _unreadable(f"{path}: expected a file, found {kind}.")
    if max_bytes is not None and facts.st_size > max_bytes:
        raise _unreadable(f"{path}: expected at most {max_bytes} bytes, found {facts.st_size}.")


def _unreadable(problem: str) -> UserError:
    return UserError(problem, code="file-unreadable")


def read_text(path: Path) -> str:
    """A whole file of text.

    Raises:
        UserError: no such file, far too large, not readable, not UTF-8.
    """
    require_file(path, max_bytes=_MAX_BYTES)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(f"could not read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: expected UTF-8 text: {error}.",
            code="not-utf8",
            remedy="Restore or delete it.",
        ) from error


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's keys and values, for `object_pairs_hook`.

    Raises:
        ValueError: a key stands there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} twice")
    return found


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON; the message names it and the place.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=each_key_once)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}).", code="not-json", remedy="Restore or delete it."
        ) from error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes.

    Raises:
        UserError: no such file, or not readable.
    """
    require_file(path)
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def below(folder: Path, pattern: str) -> Iterator[Path]:
    """What lies below `folder` by a name that fits, while others may remove files and folders there."""
    for place, folders, names in os.walk(
        folder
    ):  # passes over a folder that is gone, as rglob does not
        for name in (*folders, *names):
            if fnmatch.fnmatchcase(name, pattern):
                yield Path(place, name)


def bytes_below(folder: Path, pattern: str) -> int:
    """The bytes of the files below `folder` whose names fit."""
    total = 0
    for path in below(folder, pattern):
        with contextlib.suppress(FileNotFoundError):  # removed since
            total += path.stat().st_size
    return total


def sweep_temporaries(folder: Path, *, idle_s: float = 0.0, of: str = "*") -> None:
    """Delete what a killed writer left below `folder`, of the files named `of`.

    Args:
        idle_s: where the writer may live, only what nobody has touched for so long.
    """
    for leftover in list(below(folder, f".{of}.tmp-*")):
        with contextlib.suppress(FileNotFoundError):  # its writer may be alive, and done with it
            if time.time() - leftover.lstat().st_mtime < idle_s:
                continue
            if leftover.is_dir() and not leftover.is_symlink():
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
    try:
        with writing(path):
            temporary.mkdir(parents=True)
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
