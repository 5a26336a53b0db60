# SPDX-License-Identifier: Apache-2.0
"""`.pt` files: written whole or not at all; opened without running anything that they hold.

A `.pt` is a zip with a pickle in it, and a pickle is a program. `weights_only` runs it with tensors
and plain containers alone; what else it asks for is refused unread. The older format, without the
zip, is refused too: it says itself how much memory its tensors need, whatever its size.
"""

import errno
from pathlib import Path
from typing import Any, TypeGuard

import torch

from shared.errors import UserError
from shared.io.files import atomic_path, require_file

_WRITER = ("inline_container", "iostream error")
_ZIP = b"PK\x03\x04"


def load_tensors(path: Path, *, label: str, remedy: str, mmap: bool = True) -> Any:
    """What `torch.save` put into `path`, on the CPU.

    Args:
        label: what was expected there.
        remedy: what to do where it is something else.
        mmap: whether tensors stay in the file until they are used.

    Raises:
        UserError: no such file, or no such content.
    """
    require_file(path)
    try:
        with path.open("rb") as handle:
            if handle.read(len(_ZIP)) != _ZIP:
                raise ValueError("no zip, as torch.save writes it since version 1.6")
        return torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")
    except Exception as error:  # the file's own program decides what goes wrong
        raise wrong(path, error, label=label, remedy=remedy) from error


def save_tensors(path: Path, value: Any) -> None:
    """Write `value` as a `.pt`, whole or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:
            if not any(words in str(error) for words in _WRITER):
                raise
            # torch's writer reports a full disk in these ways.
            raise OSError(errno.ENOSPC, str(error).splitlines()[0]) from error


def is_dense(value: Any, dtype: torch.dtype | None = None) -> TypeGuard[torch.Tensor]:
    """Whether this is a plain tensor on the CPU, and of `dtype`, that is as large as it says."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.device.type != "cpu":
        return False
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        return False
    # A stride of 0 lets one number stand for a terabyte.
    there = value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    return there and dtype in (None, value.dtype)


def wrong(path: Path, error: Exception, *, label: str, remedy: str) -> UserError:
    """The refusal of a file that opened, or did not, and is not what was expected."""
    reported = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(
        f"{path}: expected {label}, found: {reported[:500]}.",
        code="tensors-invalid",
        remedy=remedy,
        facts={"path": str(path)},
    )
