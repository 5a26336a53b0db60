# SPDX-License-Identifier: Apache-2.0
"""Attention of a TTT step on an accelerator: Triton kernels, forward and backward.

What `kernels/attention.py` computes, in three launches. Documents need no blocks: both slots and
document starts ascend over the rows, so a tile of rows sees the keys from its first row's start to
its last row's slot, and a mask does the rest. Scores live in registers; the backward pass makes them
again from the log-sum-exp.

Shapes: T packed tokens, R requested slots, k chain members, Hq / Hkv query / key heads, G = Hq / Hkv,
d head size. This file is imported only where the kernels run.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _dot(left, right, EXACT: tl.constexpr):
    """A product with sums in float32; in float32 throughout if EXACT."""
    if EXACT:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    return tl.dot(left.to(right.dtype), right)


@triton.jit
def _places(rows, head, column, HEADS: tl.constexpr, D: tl.constexpr):
    """Where one head of some rows of [n, HEADS, D] lies."""
    return (rows.to(tl.int64) * HEADS + head)[:, None] * D + column[None, :]


@triton.jit
def _tile(slots, starts, rows, stop):
    """Which rows are real, their slots, and where their documents start; padding rows see no key."""
    real = rows < stop
    slot = tl.load(slots + rows, mask=real, other=-1)
    return real, slot, tl.load(starts + rows, mask=real, other=2147483647)


@triton.jit
def _shown(keys, slot, start):
    """[rows, keys]: which keys a row sees."""
    return (keys[None, :] <= slot[:, None]) & (keys[None, :] >= start[:, None])


@triton.jit
def _forward(
    query, key, value, chain_key, chain_value, slots, starts, out, lse,
    num_rows, scale,
    QH: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, K: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of M rows and one query head. query [R, QH, D], key [T, KH, D], chain [K, R, KH, D]."""
    head = tl.program_id(1)
    kv_head = head // (QH // KH)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.arange(0, DP)
    real, slot, start = _tile(slots, starts, rows, num_rows)
    there = real[:, None] & (column < D)[None, :]
    at = _places(rows, head, column, QH, D)
    q = tl.load(query + at, mask=there, other=0.0)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, DP], tl.float32)
    for member in range(K):
        own = _places(member * num_rows + rows, kv_head, column, KH, D)
        k = tl.load(chain_key + own, mask=there, other=0.0).to(tl.float32)
        v = tl.load(chain_value + own, mask=there, other=0.0).to(tl.float32)
        score = tl.sum(q.to(tl.float32) * k, 1) * scale
        higher = tl.maximum(top, score)
        shrink, weight = tl.exp(top - higher), tl.exp(score - higher)
        total = total * shrink + weight
        result = result * shrink[:, None] + weight[:, None] * v
        top = higher
    for first in range(tl.min(start), tl.max(slot) + 1, N):
        keys = first + tl.arange(0, N)
        shown = _shown(keys, slot, start)
        inside = (keys <= tl.max(slot))[:, None] & (column < D)[None, :]
        source = _places(keys, kv_head, column, KH, D)
        k = tl.load(key + source, mask=inside, other=0.0)
        v = tl.load(value + source, mask=inside, other=0.0)
        scores = _dot(q, tl.trans(k), EXACT) * scale
        scores = tl.where(shown, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weights = tl.exp(top - safe), tl.exp(scores - safe[:, None])
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None]
        result += _dot(weights, v, EXACT)
        top = higher
    tl.store(out + at, (result / total[:, None]).to(out.dtype.element_ty), mask=there)
    tl.store(lse + rows.to(tl.int64) * QH + head, top + tl.log(total), mask=real)


@triton.jit
def _backward_rows(
    query, key, value, chain_key, chain_value, slots, starts, out, lse, grad,
    grad_query, delta, num_rows, scale,
    QH: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, K: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries [R, QH, D], and delta [R, QH] = sum(out * grad)."""
    head = tl.program_id(1)
    kv_head = head // (QH // KH)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.arange(0, DP)
    real, slot, start = _tile(slots, starts, rows, num_rows)
    there = real[:, None] & (column < D)[None, :]
    at = _places(rows, head, column, QH, D)
    q = tl.load(query + at, mask=there, other=0.0)
    do = tl.load(grad + at, mask=there, other=0.0)
    o = tl.load(out + at, mask=there, other=0.0)
    peak = tl.load(lse + rows.to(tl.int64) * QH + head, mask=real, other=0.0)
    mean = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + rows.to(tl.int64) * QH + head, mean, mask=real)
    dq = tl.zeros([M, DP], tl.float32)
    for member in range(K):
        own = _places(member * num_rows + rows, kv_head, column, KH, D)
        k = tl.load(chain_key + own, mask=there, other=0.0).to(tl.float32)
        v = tl.load(chain_value + own, mask=there, other=0.0).to(tl.float32)
        weight = tl.exp(tl.sum(q.to(tl.float32) * k, 1) * scale - peak)
        by_score = weight * (tl.sum(do.to(tl.float32) * v, 1) - mean)
        dq += by_score[:, None] * k
    for first in range(tl.min(start), tl.max(slot) + 1, N):
        keys = first + tl.arange(0, N)
        shown = _shown(keys, slot, start)
        inside = (keys <= tl.max(slot))[:, None] & (column < D)[None, :]
        source = _places(keys, kv_head, column, KH, D)
        k = tl.load(key + source, mask=inside, other=0.0)
        v = tl.load(value + source, mask=inside, other=0.0)
        scores = _dot(q, tl.trans(k), EXACT) * scale
        weights = tl.where(shown, tl.exp(scores - peak[:, None]), 0.0)
        by_weight = _dot(do, tl.trans(v), EXACT)
        by_score = weights * (by_weight - mean[:, None])
        dq += _dot(by_score, k, EXACT)
    tl.store(grad_query + at, (dq * scale).to(grad_query.dtype.element_ty), mask=there)


@triton.jit
def _backward_keys(
    query, key, value, slots, starts, lse, grad, delta, first_rows, last_rows,
    grad_key, grad_value, num_rows, num_keys, scale,
    QH: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of N step-0 keys and values, over the rows that may see one of them."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    keys = tile * N + tl.arange(0, N)
    column = tl.arange(0, DP)
    inside = (keys < num_keys)[:, None] & (column < D)[None, :]
    source = _places(keys, kv_head, column, KH, D)
    k = tl.load(key + source, mask=inside, other=0.0)
    v = tl.load(value + source, mask=inside, other=0.0)
    dk, dv = tl.zeros([N, DP], tl.float32), tl.zeros([N, DP], tl.float32)
    begin, end = tl.load(first_rows + tile), tl.load(last_rows + tile)
    for first in range(begin, end, M):
        rows = first + tl.arange(0, M)
        real, slot, start = _tile(slots, starts, rows, end)
        there = real[:, None] & (column < D)[None, :]
        shown = _shown(keys, slot, start)
        for head in range(kv_head * (QH // KH), (kv_head + 1) * (QH // KH)):
            index = rows.to(tl.int64) * QH + head
            at = _places(rows, head, column, QH, D)
            q = tl.load(query + at, mask=there, other=0.0)
            do = tl.load(grad + at, mask=there, other=0.0)
            peak = tl.load(lse + index, mask=real, other=0.0)
            mean = tl.load(delta + index, mask=real, other=0.0)
            scores = _dot(q, tl.trans(k), EXACT) * scale
            weights = tl.where(shown, tl.exp(scores - peak[:, None]), 0.0)
            by_weight = _dot(do, tl.trans(v), EXACT)
            by_score = weights * (by_weight - mean[:, None])
            dv += _dot(tl.trans(weights), do, EXACT)
            dk += _dot(tl.trans(by_score), q, EXACT)
    tl.store(grad_key + source, (dk * scale).to(grad_key.dtype.element_ty), mask=inside)
    tl.store(grad_value + source, dv.to(grad_value.dtype.element_ty), mask=inside)


@triton.jit
def _backward_chain(
    query, chain_key, chain_value, lse, grad, delta, grad_key, grad_value, num_rows, scale,
    QH: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Gradients of one chain member's keys and values in a tile of rows."""
    kv_head, member = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.arange(0, DP)
    real = rows < num_rows
    there = real[:, None] & (column < D)[None, :]
    own = _places(member * num_rows + rows, kv_head, column, KH, D)
    k = tl.load(chain_key + own, mask=there, other=0.0).to(tl.float32)
    v = tl.load(chain_value + own, mask=there, other=0.0).to(tl.float32)
    dk, dv = tl.zeros([M, DP], tl.float32), tl.zeros([M, DP], tl.float32)
    for head in range(kv_head * (QH // KH), (kv_head + 1) * (QH // KH)):
        index = rows.to(tl.int64) * QH + head
        at = _places(rows, head, column, QH, D)
        q = tl.load(query + at, mask=there, other=0.0).to(tl.float32)
        do = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
        peak = tl.load(lse + index, mask=real, other=0.0)
        mean = tl.load(delta + index, mask=real, other=0.0)
        weight = tl.exp(tl.sum(q * k, 1) * scale - peak)
        by_score = weight * (tl.sum(do * v, 1) - mean)
        dv += weight[:, None] * do
        dk += by_score[:, None] * q
    tl.store(grad_key + own, (dk * scale).to(grad_key.dtype.element_ty), mask=there)
    tl.store(grad_value + own, dv.to(grad_value.dtype.element_ty), mask=there)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chain_keys: Tensor,
    chain_values: Tensor,
    slots: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output [R, Hq, d] and log-sum-exp [R, Hq], both float32.

    Args:
        chain_keys: [k, R, Hkv, d], and so are the values.
        slots: int32 [R], and so are the starts of their documents.
    """
    num_rows, num_heads, size = query.shape
    # The backward pass subtracts sums over the output: its rounding would be most of a small gradient.
    out = torch.empty_like(query, dtype=torch.float32)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    if num_rows:
        constants = constants_of(query, key)
        _forward[(triton.cdiv(num_rows, constants["M"]), num_heads)](
            query, key, value, chain_keys, chain_values, slots, starts, out, lse, num_rows,
            size**-0.5, **constants, N=constants["M"], K=len(chain_keys), EXACT=_is_exact(query),
        )  # fmt: skip
    return out, lse


def backward(inputs: Sequence[Tensor], out: Tensor, lse: Tensor, grad: Tensor) -> list[Tensor]:
    """Gradients of query, key, value, chain keys and chain values; `inputs` are those of `forward`."""
    query, key, value, chain_keys, chain_values, slots, starts = inputs
    num_rows, num_heads, size = query.shape
    num_tokens, num_kv_heads = key.shape[:2]
    grads = [torch.zeros_like(x, dtype=_stored(x)) for x in inputs[:5]]
    if num_rows:
        delta, scale, constants = lse.new_empty(lse.shape), size**-0.5, constants_of(query, key)
        side, exact = constants["M"], _is_exact(query)
        grid = (triton.cdiv(num_rows, side), num_heads)
        _backward_rows[grid](
            *inputs, out, lse, grad, grads[0], delta, num_rows, scale,
            **constants, N=side, K=len(chain_keys), EXACT=exact,
        )  # fmt: skip
        tiles = torch.arange(0, num_tokens, side, device=key.device, dtype=slots.dtype)
        # A row sees a key of a tile if its slot is not before the tile and its start not behind it.
        first_rows = torch.searchsorted(slots, tiles).to(torch.int32)
        last_rows = torch.searchsorted(starts, tiles + side - 1, right=True).to(torch.int32)
        _backward_keys[(len(tiles), num_kv_heads)](
            query, key, value, slots, starts, lse, grad, delta, first_rows, last_rows,
            grads[1], grads[2], num_rows, num_tokens, scale, **constants, N=side, EXACT=exact,
        )  # fmt: skip
        if len(chain_keys):
            _backward_chain[(grid[0], num_kv_heads, len(chain_keys))](
                query, chain_keys, chain_values, lse, grad, delta, grads[3], grads[4],
                num_rows, scale, **constants,
            )  # fmt: skip
    return [x.to(query.dtype) for x in grads]


def constants_of(query: Tensor, key: Tensor) -> dict[str, int]:
    """What the kernels are compiled for: heads, their size (padded), rows and keys of a tile, stages.

    A tile must fit the shared memory of a card: 99 KiB at the least where bfloat16 runs (capability
    8.6), 64 KiB where only float32 does (7.5). A product in float32 does not run on tensor cores, so
    reading ahead for it would cost memory and gain nothing.
    """
    size, num_bytes = query.shape[2], query.element_size()
    padded = max(16, triton.next_power_of_2(size))  # the least that a tile's product takes
    tile_bytes = 8192 if num_bytes > 2 else 16384
    side = min(64, max(16, tile_bytes // (padded * num_bytes)))
    stages = 1 if num_bytes > 2 else 3
    heads = {"QH": query.shape[1], "KH": key.shape[1]}
    return {**heads, "D": size, "DP": padded, "M": side, "num_stages": stages}


def _is_exact(query: Tensor) -> bool:
    # Triton's interpreter has no products in bfloat16.
    return query.dtype == torch.float32 or triton.knobs.runtime.interpret


def _stored(x: Tensor) -> torch.dtype:
    """The dtype that a kernel stores results in: Triton's interpreter truncates to bfloat16."""
    return torch.float32 if triton.knobs.runtime.interpret else x.dtype
