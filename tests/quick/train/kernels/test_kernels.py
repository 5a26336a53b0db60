# SPDX-License-Identifier: Apache-2.0
"""The layer's own kernels: attention in blocks and chains, rotation, norm; values and gradients."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.errors import UserError
from shared.runtime import compiler
from stages.train.kernels import blocks as blocks_module
from stages.train.kernels.attention import ChainAttention
from stages.train.kernels.blocks import attention_blocks, narrowed
from stages.train.kernels.fused import require_compiler
from stages.train.kernels.norm import RMSNormOnCPU
from stages.train.kernels.rotary import Rotation
from stages.train.objective.slices import even_slices


def test_the_worked_example_of_even_slices() -> None:
    assert list(even_slices(2, 9, 3)) == [slice(2, 4), slice(4, 6), slice(6, 9)]
    assert list(even_slices(2, 2, 3)) == []


def test_kernels_that_cannot_be_compiled_are_refused_where_they_would_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Tensors without storage count as an accelerator's."""
    card, cpu = torch.device("meta"), torch.device("cpu")
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiler, "include_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=f"headers, found no {tmp_path}/Python.h"):
        require_compiler(card)
    (tmp_path / "Python.h").touch()
    require_compiler(card)
    (tmp_path / "gcc").rename(tmp_path / "cc")  # which Triton does not look for
    with pytest.raises(UserError, match="found no C compiler"):
        require_compiler(card)
    require_compiler(cpu)
    monkeypatch.setenv("EYRIE_TRAIN_KERNELS", "torch")
    require_compiler(card)


def test_the_worked_example_of_attention_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "ROUND_ROWS", 2)
    monkeypatch.setattr(blocks_module, "ROUND_KEYS", 2)
    ((tokens, (block,)),) = attention_blocks(torch.tensor([3, 4, 6]), torch.tensor([0, 8, 10]))
    assert (tokens, block.rows, block.num_keys) == (slice(0, 8), slice(0, 3), 8)
    by_slot = {3: [1, 1, 1, 1], 4: [0, 1, 1, 1], 6: [0, 0, 0, 1], "nobody": [0, 0, 0, 0]}
    assert block.later[:, 0].int().tolist() == list(by_slot.values())


@pytest.mark.parametrize("reach", [1, 2, 3, 100])
def test_a_window_shows_each_row_its_last_keys(reach: int) -> None:
    slots, offsets = torch.tensor([1, 3, 6, 8, 9, 12]), torch.tensor([0, 5, 13])
    with mock.patch.multiple(blocks_module, SPAN_TOKENS=3, ROUND_ROWS=2, ROUND_KEYS=4):
        documents = narrowed(attention_blocks(slots, offsets), slots, reach)
    for tokens, blocks in documents:
        for rows, num_keys, later in blocks:
            assert later.shape[1:] == (1, num_keys)
            for slot, hidden in zip(slots[rows].tolist(), later[:, 0].tolist(), strict=False):
                own = slot - tokens.start
                seen = range(max(0, own - reach + 1), own + 1)
                assert [key for key in range(num_keys) if not hidden[key]] == list(seen)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    bits=st.lists(st.booleans(), min_size=30, max_size=30),
    span=st.sampled_from([1, 2, 256]),
    step=st.sampled_from([1, 2, 64]),
)
def test_blocks_show_each_row_the_mask_s_keys(
    lengths: list[int], bits: list[bool], span: int, step: int
) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = int(offsets[-1])
    slots = torch.tensor(bits[:total]).nonzero().flatten()
    sizes = {"SPAN_TOKENS": span, "ROUND_ROWS": step, "ROUND_KEYS": step}
    with mock.patch.multiple(blocks_module, **sizes):
        documents = attention_blocks(slots, offsets)
    seen = torch.zeros(len(slots), total, dtype=torch.int64)
    for tokens, blocks in documents:
        for rows, num_keys, later in blocks:
            assert slots[rows][-1] - slots[rows][0] < span
            assert len(later) % step == num_keys % step == 0
            shown = torch.ones(len(later), num_keys, dtype=torch.bool)
            shown[:, num_keys - later.shape[-1] :] &= ~later[:, 0]
            shown = shown[: rows.stop - rows.start]
            length = tokens.stop - tokens.start
            assert not shown[:, length:].any(), "a key behind the document"
            seen[rows, tokens][:, :num_keys] += shown[:, :length]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    key = torch.arange(total)
    mask = (key[None] <= slots[:, None]) & (document[None] == document[slots][:, None])
    assert torch.equal(seen, mask.long())


OFFSETS, SLOTS = torch.tensor([0, 5, 9]), torch.tensor([1, 2, 4, 5, 7, 8])


def attention_inputs(dtype: torch.dtype, members: int) -> tuple[list[Tensor], list[Tensor]]:
    """Query, key and value, then the chain's keys and values: 4 query heads on 2 key heads."""
    torch.manual_seed(0)
    shapes = [(6, 4), (9, 2), (9, 2)], [(6, 2)] * (2 * members)
    main, chain = (
        [torch.randn(*shape, 4, dtype=dtype, requires_grad=True) for shape in part]
        for part in shapes
    )
    return main, chain


def torch_s_attention(query: Tensor, key: Tensor, value: Tensor, *chain: Tensor) -> Tensor:
    """torch's own, over the step-0 keys and all slots' chains, with a mask that says who sees what."""
    mask = torch.tensor(
        [
            [1, 1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 1, 0, 0, 0],
            [0, 0, 0, 0, 0, 1, 1, 1, 0],
            [0, 0, 0, 0, 0, 1, 1, 1, 1],
        ],
        dtype=torch.bool,
    )
    own = torch.eye(len(query), dtype=torch.bool)
    mask = torch.cat([mask, *[own] * (len(chain) // 2)], dim=1)
    keys, values = torch.cat([key, *chain[::2]]), torch.cat([value, *chain[1::2]])
    heads_first = (x.transpose(0, 1)[None] for x in (query, keys, values))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


# A span of 2 and no counting up: slot 4 is a block of its own, in which no key comes later.
@pytest.mark.parametrize(("span", "step"), [(2, 1), (2, 4), (192, 64)])
@pytest.mark.parametrize("members", [0, 1, 8, 9])
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_attention_is_torch_s(
    dtype: torch.dtype, apart: float, members: int, span: int, step: int
) -> None:
    sizes = {"SPAN_TOKENS": span, "ROUND_ROWS": step, "ROUND_KEYS": step}
    with mock.patch.multiple(blocks_module, **sizes):
        documents = attention_blocks(SLOTS, OFFSETS)
    main, chain = attention_inputs(dtype, members)
    found = ChainAttention.apply(*main, documents, *chain)
    exact = [x.detach().double().requires_grad_() for x in (*main, *chain)]
    expected = torch_s_attention(*exact)
    by_output = torch.randn_like(expected)
    found_grads = torch.autograd.grad(found, [*main, *chain], by_output.to(dtype))
    expected_grads = torch.autograd.grad(expected, exact, by_output)
    pairs = zip((found, *found_grads), (expected, *expected_grads), strict=True)
    assert max(float((x - y).detach().norm() / y.detach().norm()) for x, y in pairs) < apart


def test_attention_gradients_are_those_of_finite_differences() -> None:
    main, chain = attention_inputs(torch.float64, 2)
    documents = attention_blocks(SLOTS, OFFSETS)

    def attend(*inputs: Tensor) -> Tensor:
        return ChainAttention.apply(*inputs[:3], documents, *inputs[3:])

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


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-6), (torch.bfloat16, 0.004)])
def test_the_norm_is_as_precise_in_mixed_precision(dtype: torch.dtype, apart: float) -> None:
    """Autocast would take the sum of squares in bfloat16: three digits of every output's."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 300, dtype=dtype), torch.rand(300) + 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = RMSNormOnCPU.apply(x, weight, 1e-5)
    assert found.dtype == dtype
    expected = torch.rms_norm(x.double(), (300,), weight.double(), 1e-5)
    scale = (found.double() / expected).mean(1)
    assert float((scale - 1).abs().max()) < apart / 10
    torch.testing.assert_close(found.double(), expected, atol=0, rtol=apart)
