# SPDX-License-Identifier: Apache-2.0
"""The layer's own kernels: attention in blocks and chains, rotation, norm; values and gradients."""

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.train import attention as attention_module
from stages.train.attention import ChainAttention, attention_blocks
from stages.train.norm import RMSNormOnCPU
from stages.train.rotary import Rotation
from stages.train.slices import even_slices


def test_the_worked_example_of_even_slices() -> None:
    assert list(even_slices(2, 9, 3)) == [slice(2, 4), slice(4, 6), slice(6, 9)]
    assert list(even_slices(2, 2, 3)) == []


def test_the_worked_example_of_attention_blocks() -> None:
    blocks = attention_blocks(torch.tensor([3, 4, 6]), torch.tensor([0, 8]))
    assert blocks == [
        (slice(0, 2), slice(3, 5), True),
        (slice(0, 3), slice(0, 3), False),
        (slice(2, 3), slice(6, 7), True),
        (slice(2, 3), slice(3, 6), False),
    ]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    bits=st.lists(st.booleans(), min_size=30, max_size=30),
    longest=st.sampled_from([1, 2, 256]),
)
def test_blocks_cover_the_mask_once(lengths: list[int], bits: list[bool], longest: int) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = int(offsets[-1])
    slots = torch.tensor(bits[:total]).nonzero().flatten()
    covered = torch.zeros(len(slots), total, dtype=torch.int64)
    with mock.patch.object(attention_module, "SQUARE_SLOTS", longest):
        blocks = attention_blocks(slots, offsets)
    for rows, keys, causal in blocks:
        assert not causal or rows.stop - rows.start <= longest
        block = torch.ones_like(covered[rows, keys])
        covered[rows, keys] += block.tril() if causal else block
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    key = torch.arange(total)
    mask = (key[None] <= slots[:, None]) & (document[None] == document[slots][:, None])
    assert torch.equal(covered, mask.long())


def attention_inputs(dtype: torch.dtype) -> tuple[list[Tensor], list[Any], list[Tensor]]:
    torch.manual_seed(0)
    offsets, slots = torch.tensor([0, 5, 9]), torch.tensor([1, 2, 4, 5, 7, 8])
    main = [
        torch.randn(n, h, 4, dtype=dtype, requires_grad=True) for n, h in ((6, 4), (9, 2), (9, 2))
    ]
    chain = [torch.randn(6, 2, 4, dtype=dtype, requires_grad=True) for _ in range(4)]
    return main, attention_blocks(slots, offsets), chain


def test_attention_gradients_are_those_of_finite_differences() -> None:
    main, blocks, chain = attention_inputs(torch.float64)

    def attend(*inputs: Tensor) -> Tensor:
        return ChainAttention.apply(*inputs[:3], blocks, *inputs[3:])

    assert torch.autograd.gradcheck(attend, (*main, *chain), fast_mode=True)


def test_the_norm_on_a_cpu_is_torch_s() -> None:
    torch.manual_seed(0)
    results = []
    for norm in (RMSNormOnCPU.apply, lambda x, w, eps: torch.rms_norm(x, w.shape, w, eps)):
        x, weight = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
        x[0, 0] *= 1e-3  # there the epsilon matters
        given = [value.clone().requires_grad_() for value in (x, weight)]
        out = norm(*given, 1e-5)
        out.sin().sum().backward()
        results.append([out, *(value.grad for value in given)])
        torch.manual_seed(0)
    torch.testing.assert_close(results[0], results[1])


def test_a_rotation_s_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(3, 1, 2, dtype=torch.float64).repeat(1, 1, 2)
    assert torch.autograd.gradcheck(Rotation.apply, (x, angles.cos(), angles.sin()))


def test_plain_attention_for_other_devices_equals_the_cpu_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for kind in ("_attend_cpu", "_attend_anywhere"):
        monkeypatch.setattr(attention_module, "_attend_cpu", getattr(attention_module, kind))
        monkeypatch.setattr(
            attention_module, "_attend_cpu_backward", getattr(attention_module, f"{kind}_backward")
        )
        main, blocks, chain = attention_inputs(torch.float32)
        out = ChainAttention.apply(*main, blocks, *chain)
        out.sin().sum().backward()
        results.append([out, *(x.grad for x in (*main, *chain))])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
