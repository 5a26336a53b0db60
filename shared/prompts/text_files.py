# SPDX-License-Identifier: Apache-2.0
"""Text files as streams of bytes, compressed or not, and what only bears the name of one."""

import bz2
import contextlib
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from shared.errors import UserError
from shared.io import files

_CHUNK_BYTES = 1 << 20
# What a file may be in truth, by its first bytes, that is named as text.
_NO_TEXT = {
    b"\x1f\x8b": "a file that gzip compressed: name it .gz",
    b"\x28\xb5\x2f\xfd": "a file that zstd compressed: name it .zst",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_POINTER = b"version https://git-lfs."


class _Arrow(io.RawIOBase):
    """Arrow's decompressing stream as a plain file object."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._stream = pa.input_stream(
            path, compression={".zst": "zstd", ".lz4": "lz4"}[path.suffix.lower()]
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(_Arrow(path), _CHUNK_BYTES),
    ".lz4": lambda path: io.BufferedReader(_Arrow(path), _CHUNK_BYTES),
}


def unreadable(path: Path, expected: str, error: object) -> UserError:
    """The refusal of a file that is not what its name says."""
    return UserError(
        f"{files.printable(path)}: expected {expected}, found {error}.",
        code="prompts-unreadable",
        remedy="Mend, replace or remove the file.",
        facts={"path": files.printable(path)},
    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed where its name says so."""
    opener = COMPRESSED.get(path.suffix.lower())
    with opener(path) if opener else path.open("rb") as stream:
        yield stream


def require_data(path: Path) -> None:
    """Refuse a pointer in the place of a file.

    Raises:
        UserError: Git LFS has not fetched it.
    """
    with path.open("rb") as raw:
        if raw.read(len(_POINTER)) == _POINTER:
            raise unreadable(path, "data", "a Git LFS pointer to it: `git lfs pull` fetches it")


def require_text(path: Path) -> None:
    """Refuse a file of which every line would be a broken row, however many rows it stands for.

    Raises:
        UserError: its first bytes are those of something else.
    """
    with opened(path) as stream:
        start = stream.read(max(map(len, _NO_TEXT)))
    if found := next((name for magic, name in _NO_TEXT.items() if start.startswith(magic)), None):
        raise unreadable(path, "text in UTF-8", found)
