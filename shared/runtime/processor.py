# SPDX-License-Identifier: Apache-2.0
"""What this machine's processor can do, and what work on it asks of the C libraries."""

import ctypes
import os

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's <malloc.h>


def has_bfloat16() -> bool:
    """Whether it multiplies in bfloat16 (Zen 4 and later, Sapphire Rapids and later)."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def keep_freed_memory() -> bool:
    """Have freed memory stay with this process; whether the C library knows how.

    A step's large tensors are otherwise mapped anew and zeroed by the kernel at every step, which
    takes a tenth to a third of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def keep_order_of_sums() -> None:
    """Have MKL add in the same order in every run, as a resumed one must.

    It promises that only where asked to: conditional numerical reproducibility, for one number of
    threads on one processor. An operator's own choice stays.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO")
