# SPDX-License-Identifier: Apache-2.0
"""Attention of a TTT step on an accelerator: Triton kernels, forward and backward.

What `kernels/attention.py` computes, in three launches. Documents need no blocks: both slots and
document starts ascend over the rows, so a tile of rows sees the keys from its first row's start to
its last row's slot, and a mask does the rest. Scores live in registers; the backward pass makes them
again from the log-sum-exp.

Shapes: T packed tokens, R requested slots, k chain members, Hq / Hkv query / key heads, G = Hq / Hkv,
d head size. This file is imported only where the kernels run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, KEYS = 64, 64  # of a tile


@triton.jit
def _dot(left, right, EXACT: tl.constexpr):
    """A product with sums in float32; in float32 throughout if EXACT."""
    if EXACT:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    return tl.dot(left.to(right.dtype), right)


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
    real = rows < num_rows
    there = real[:, None] & (column < D)[None, :]
    at = (rows.to(tl.int64) * QH + head)[:, None] * D + column[None, :]
    q = tl.load(query + at, mask=there, other=0.0)
    slot = tl.load(slots + rows, mask=real, other=-1)
    start = tl.load(starts + rows, mask=real, other=2147483647)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, DP], tl.float32)
    for member in range(K):
        own = ((member * num_rows + rows.to(tl.int64)) * KH + kv_head)[:, None] * D + column[
            None, :
        ]
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
        shown = (keys[None, :] <= slot[:, None]) & (keys[None, :] >= start[:, None])
        inside = (keys <= tl.max(slot))[:, None] & (column < D)[None, :]
        source = (keys.to(tl.int64) * KH + kv_head)[:, None] * D + column[None, :]
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
    real = rows < num_rows
    there = real[:, None] & (column < D)[None, :]
    at = (rows.to(tl.int64) * QH + head)[:, None] * D + column[None, :]
    q = tl.load(query + at, mask=there, other=0.0)
    do = tl.load(grad + at, mask=there, other=0.0)
    o = tl.load(out + at, mask=there, other=0.0)
    peak = tl.load(lse + rows.to(tl.int64) * QH + head, mask=real, other=0.0)
    slot = tl.load(slots + rows, mask=real, other=-1)
    start = tl.load(starts + rows, mask=real, other=2147483647)
    mean = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + rows.to(tl.int64) * QH + head, mean, mask=real)
    dq = tl.zeros([M, DP], tl.float32)
    for member in range(K):
        own = ((member * num_rows + rows.to(tl.int64)) * KH + kv_head)[:, None] * D + column[
            None, :
        ]
        k = tl.load(chain_key + own, mask=there, other=0.0).to(tl.float32)
        v = tl.load(chain_value + own, mask=there, other=0.0).to(tl.float32)
        weight = tl.exp(tl.sum(q.to(tl.float32) * k, 1) * scale - peak)
        by_score = weight * (tl.sum(do.to(tl.float32) * v, 1) - mean)
        dq += by_score[:, None] * k
    for first in range(tl.min(start), tl.max(slot) + 1, N):
        keys = first + tl.arange(0, N)
        shown = (keys[None, :] <= slot[:, None]) & (keys[None, :] >= start[:, None])
        inside = (keys <= tl.max(slot))[:, None] & (column < D)[None, :]
        source = (keys.to(tl.int64) * KH + kv_head)[:, None] * D + column[None, :]
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
    source = (keys.to(tl.int64) * KH + kv_head)[:, None] * D + column[None, :]
    k = tl.load(key + source, mask=inside, other=0.0)
    v = tl.load(value + source, mask=inside, other=0.0)
    dk, dv = tl.zeros([N, DP], tl.float32), tl.zeros([N, DP], tl.float32)
    begin, end = tl.load(first_rows + tile), tl.load(last_rows + tile)
    for first in range(begin, end, M):
        rows = first + tl.arange(0, M)
        real = rows < end
        there = real[:, None] & (column < D)[None, :]
        slot = tl.load(slots + rows, mask=real, other=-1)
        start = tl.load(starts + rows, mask=real, other=2147483647)
        shown = (keys[None, :] <= slot[:, None]) & (keys[None, :] >= start[:, None])
        for head in range(kv_head * (QH // KH), (kv_head + 1) * (QH // KH)):
            index = rows.to(tl.int64) * QH + head
            at = index[:, None] * D + column[None, :]
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
    own = ((member * num_rows + rows.to(tl.int64)) * KH + kv_head)[:, None] * D + column[None, :]
    k = tl.load(chain_key + own, mask=there, other=0.0).to(tl.float32)
    v = tl.load(chain_value + own, mask=there, other=0.0).to(tl.float32)
    dk, dv = tl.zeros([M, DP], tl.float32), tl.zeros([M, DP], tl.float32)
    for head in range(kv_head * (QH // KH), (kv_head + 1) * (QH // KH)):
        index = rows.to(tl.int64) * QH + head
        at = index[:, None] * D + column[None, :]
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
    chain: tuple[Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Output [R, Hq, d] and log-sum-exp [R, Hq] float32.

    Args:
        chain: keys and values, each [k, R, Hkv, d].
        rows: slots and starts of their documents, each int32 [R].
    """
    num_rows, num_heads, _ = query.shape
    out = torch.empty_like(query, dtype=_stored(query))
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    if num_rows:
        grid = (triton.cdiv(num_rows, ROWS), num_heads)
        _forward[grid](
            query, key, value, *chain, *rows, out, lse, num_rows, query.shape[2] ** -0.5,
            **_sizes(query, key), K=len(chain[0]), N=KEYS, EXACT=_is_exact(query),
        )  # fmt: skip
    return out.to(query.dtype), lse


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    chain: tuple[Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, chain keys and chain values, in their shapes."""
    num_rows, num_heads, size = query.shape
    num_tokens, num_kv_heads = key.shape[:2]
    grads = [torch.zeros_like(x, dtype=_stored(x)) for x in (query, key, value, *chain)]
    if num_rows:
        slots, starts = rows
        delta, scale, sizes = lse.new_empty(lse.shape), size**-0.5, _sizes(query, key)
        exact, grid = _is_exact(query), (triton.cdiv(num_rows, ROWS), num_heads)
        _backward_rows[grid](
            query, key, value, *chain, *rows, out, lse, grad, grads[0], delta, num_rows, scale,
            **sizes, K=len(chain[0]), N=KEYS, EXACT=exact,
        )  # fmt: skip
        tiles = torch.arange(0, num_tokens, KEYS, device=key.device, dtype=slots.dtype)
        # A row sees a key of a tile if its slot is not before the tile and its start not behind it.
        first_rows = torch.searchsorted(slots, tiles).to(torch.int32)
        last_rows = torch.searchsorted(starts, tiles + KEYS - 1, right=True).to(torch.int32)
        _backward_keys[(len(tiles), num_kv_heads)](
            query, key, value, *rows, lse, grad, delta, first_rows, last_rows, grads[1], grads[2],
            num_rows, num_tokens, scale, **sizes, N=KEYS, EXACT=exact,
        )  # fmt: skip
        if len(chain[0]):
            _backward_chain[(grid[0], num_kv_heads, len(chain[0]))](
                query, *chain, lse, grad, delta, grads[3], grads[4], num_rows, scale, **sizes
            )
    by_query, by_key, by_value, *by_chain = (x.to(query.dtype) for x in grads)
    return by_query, by_key, by_value, by_chain[0], by_chain[1]


def _sizes(query: Tensor, key: Tensor) -> dict[str, int]:
    size = query.shape[2]
    padded = max(16, triton.next_power_of_2(size))  # the least that a tile's product takes
    return {"QH": query.shape[1], "KH": key.shape[1], "D": size, "DP": padded, "M": ROWS}


def _is_exact(query: Tensor) -> bool:
    # Triton's interpreter has no products in bfloat16.
    return query.dtype == torch.float32 or triton.knobs.runtime.interpret


def _stored(x: Tensor) -> torch.dtype:
    """The dtype that a kernel stores results in: Triton's interpreter truncates to bfloat16."""
    return torch.float32 if triton.knobs.runtime.interpret else x.dtype
