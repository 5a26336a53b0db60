# SPDX-License-Identifier: Apache-2.0
"""Which precision this machine's CPU computes faster in, and settings of its C libraries."""

import ctypes
import functools
import os
import time

import torch

_ROWS, _WIDTH, _REPEATS = 256, 1024, 3
_DTYPES = (torch.float32, torch.bfloat16)
_CAST_COST = 1.1  # casts of weights and inputs take some of what faster products save
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's <malloc.h>


@functools.cache
def faster_dtype() -> torch.dtype:
    """bfloat16 if this CPU multiplies faster in it than in float32; measured once, in about 50 ms.

    The CPU's flags do not say so: with avx512_bf16 and no AMX, float32 can be three times as fast.
    """
    rounds = [[_product_s(dtype) for dtype in _DTYPES] for _ in range(_REPEATS)]
    in_float32, in_bfloat16 = (min(times) for times in zip(*rounds, strict=True))
    return torch.bfloat16 if in_bfloat16 * _CAST_COST < in_float32 else torch.float32


def _product_s(dtype: torch.dtype) -> float:
    """Seconds of CPU time of a product; unlike time on the clock, other processes do not add to it."""
    rows, weight = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    torch.nn.functional.linear(rows, weight)  # generates code for the shape
    started_s = time.process_time()
    torch.nn.functional.linear(rows, weight)
    return time.process_time() - started_s


def keep_freed_memory() -> bool:
    """Keep freed memory in this process; False if the C library has no such setting.

    Otherwise the kernel maps and zeroes the large tensors again at every step, which takes 10 to
    30 % of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def release_freed_memory() -> None:
    """Give the kernel what `keep_freed_memory` has kept so far.

    Tensors of many lengths leave gaps between those that live on, and the kept memory would grow with them.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's alone
        trim(0)


def keep_order_of_sums() -> None:
    """Make MKL add in the same order in every run, so that a resumed run is exact.

    MKL's conditional numerical reproducibility holds for one number of threads on one processor. A
    value that the operator set is kept.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO")
