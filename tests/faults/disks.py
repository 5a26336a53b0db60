# SPDX-License-Identifier: Apache-2.0
"""File systems that fail: small ones and read-only ones, as mounts where we may, else as limits.

A mount over a run's folder shows what a real volume does: names that cannot be made, writes that end
in the middle, also for the log and the status.
"""

import contextlib
import functools
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def _mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount; a container's root often may not."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", folder)
        except (OSError, subprocess.CalledProcessError):
            return False
        subprocess.run(["umount", folder], check=True)
    return True


@contextlib.contextmanager
def small(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """`folder` on a disk of `size` bytes more than it holds; the yielded call makes it large."""
    aside = folder.with_name(f"{folder.name}-aside")
    folder.rename(aside)
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", "size=1g", "tmpfs", folder)
    try:
        shutil.copytree(aside, folder, symlinks=True, dirs_exist_ok=True)
        held = sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
        _mount("-o", f"remount,size={held + size}", folder)
        yield lambda: _mount("-o", "remount,size=1g", folder)
        shutil.rmtree(aside)
        shutil.copytree(folder, aside, symlinks=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()
        aside.rename(folder)


def no_file_above(size: int) -> Callable[[], None]:
    """For a process about to start: no file of its own may grow beyond `size`."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@contextlib.contextmanager
def _bound(source: Path, place: Path) -> Iterator[None]:
    """`place` showing what lies in `source`."""
    _mount("--bind", source, place)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """`folder` as a volume that takes no more writes, for whoever opens a file from now on."""
    if can_mount():
        # Elsewhere first: a mount on which a file is open for writing cannot be made read-only.
        with tempfile.TemporaryDirectory() as aside, _bound(folder, Path(aside)):
            _mount("-o", "remount,bind,ro", aside)
            with _bound(Path(aside), folder):
                yield
        return
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for each in folders:
        each.chmod(0o555)
    try:
        yield
    finally:
        for each in folders:
            each.chmod(0o755)
