# SPDX-License-Identifier: Apache-2.0
"""The target's probability of the draft vocabulary: what its pass over the data costs.

The pass comes before the first step, so its FLOP are the wait for it. What it newly allocates is bounded
since a process that keeps freed memory grows with it.
"""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from shared.target.tensors import FinalNorm
from stages.train.objective.target_output import CHUNK_ROWS, SharesInVocab, TargetOutput

VOCAB, DRAFT, HIDDEN = 3000, 200, 16


class _NewBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        known = {x.untyped_storage().data_ptr() for x in given if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.total += result.untyped_storage().nbytes()
        return result


def make(dtype: torch.dtype = torch.float32, **output: Any) -> tuple[SharesInVocab, torch.Tensor]:
    torch.manual_seed(0)
    whole = TargetOutput(
        FinalNorm(torch.rand(HIDDEN) + 0.5, 1e-6), torch.randn(VOCAB, HIDDEN, dtype=dtype), **output
    )
    inside = torch.arange(VOCAB) % (VOCAB // DRAFT) == 0
    return SharesInVocab(whole, inside), torch.randn(CHUNK_ROWS, HIDDEN).bfloat16()


def test_it_takes_one_product_with_the_whole_lm_head() -> None:
    find, finals = make()
    with FlopCounterMode(display=False) as counter:
        find(finals)
    assert counter.get_total_flops() == 2 * CHUNK_ROWS * HIDDEN * VOCAB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output", [{}, {"logit_scale": 0.5, "softcap": 30.0}], ids=["", "capped"])
def test_no_chunk_allocates_logits(dtype: torch.dtype, output: dict[str, float]) -> None:
    find, finals = make(dtype, **output)
    with _NewBytes() as new:
        find(finals)
    assert 0 < new.total < CHUNK_ROWS * VOCAB  # a byte each, of four


@pytest.mark.parametrize("rows", [1, 7, CHUNK_ROWS])
def test_buffers_keep_nothing_of_the_chunk_before(rows: int) -> None:
    find, finals = make(torch.bfloat16, softcap=2.0)
    expected = make(torch.bfloat16, softcap=2.0)[0](finals[:rows])
    find(finals)
    assert torch.equal(find(finals[:rows]), expected)
    assert int((expected > 0).sum()) > 0 or rows < CHUNK_ROWS
    assert all(0 <= share <= 1 and math.isfinite(share) for share in expected.tolist())
