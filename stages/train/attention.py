# SPDX-License-Identifier: Apache-2.0
"""Attention of a TTT step: step-0 keys of the same document, and the slot's own chain.

The causal part runs as blocks of a flash kernel that also returns log-sum-exp; a chain contributes
one key a step, so its scores are elementwise products; both join by log-sum-exp. No [T, T] tensor
on a CPU, forward or backward.

Shapes: T packed tokens, N documents, R requested slots, r rows and s keys of a block, Hq / Hkv
query / key heads, G = Hq / Hkv, d head size.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.train.slices import even_slices

# A square is computed whole and masked, so half of it is waste; below this, calls cost more.
SQUARE_SLOTS = 256

Mask = Tensor | None


class Block(NamedTuple):
    """Query rows that attend to one range of step-0 keys: wholly, or causally as a square."""

    rows: slice
    keys: slice
    causal: bool


def attention_blocks(slots: Tensor, offsets: Tensor) -> list[Block]:
    """Cover "step-0 slots <= own slot, same document" with causal squares and rectangles.

    Each run of neighbours (at most `SQUARE_SLOTS` of them) is a square; the keys since the run
    before it are a rectangle, which every later row of the document sees too.

    Worked example: one document of 8 tokens, slots [3, 4, 6] make two runs of neighbours.
    Run 3..4 is rows 0:2 with the square keys 3:5, and keys 0:3 are seen by rows 0:3; run 6 is row
    2:3 with the square keys 6:7, and sees keys 3:6.

    Args:
        slots: [R] int64, ascending.
        offsets: [N+1] int64.
    """
    blocks: list[Block] = []
    if not len(slots):
        return blocks
    slots, offsets = slots.cpu(), offsets.cpu()  # once, not a wait for the device at each block
    documents = torch.bucketize(slots, offsets, right=True) - 1  # [R]
    numbers, counts = documents.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    for number, start, end in zip(numbers.tolist(), [0, *ends[:-1]], ends, strict=True):
        seen = int(offsets[number])
        for rows in _runs(slots[start:end], start):
            first = int(slots[rows.start])
            blocks.append(Block(rows, slice(first, first + rows.stop - rows.start), causal=True))
            if seen < first:
                blocks.append(Block(slice(rows.start, end), slice(seen, first), causal=False))
            seen = first
    return blocks


def _runs(slots: Tensor, first_row: int) -> Iterator[slice]:
    """Rows of neighbouring slots, long runs in even pieces; `slots` begin at `first_row`."""
    breaks = (slots.diff() != 1).nonzero().flatten() + 1
    bounds = [0, *breaks.tolist(), len(slots)]
    for start, stop in itertools.pairwise(bounds):
        yield from even_slices(first_row + start, first_row + stop, SQUARE_SLOTS)


def _attend_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """One block: query [Hkv, r*G, d], key [Hkv, s, d] to output, log-sum-exp [Hkv, r*G]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], key[None], value[None], attn_mask=mask
    )
    return out[0], lse[0]


def _attend_cpu_backward(
    by_row: Sequence[Tensor], key: Tensor, value: Tensor, mask: Mask
) -> tuple[Tensor, ...]:
    """Gradients of one block's query, key and value.

    Args:
        by_row: the output's gradient and the query, then the output [Hkv, r*G, d] and the
            log-sum-exp [Hkv, r*G] of the WHOLE attention row. With those two, exp(score - lse) is
            the block's share of the row's softmax: no gradient goes through the merge.
    """
    grad, query, out, lse = by_row
    batch_of_one = (x[None] for x in (grad, query, key, value, out, lse))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *batch_of_one, 0.0, False, attn_mask=mask
    )
    return tuple(x[0] for x in grads)


def _attend_anywhere(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask
) -> tuple[Tensor, Tensor]:
    """`_attend_cpu` in plain products, for other devices: the block's scores are stored."""
    scores = _block_scores(query, key, mask)  # [Hkv, r*G, s]
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ value.float(), lse


def _attend_anywhere_backward(
    by_row: Sequence[Tensor], key: Tensor, value: Tensor, mask: Mask
) -> tuple[Tensor, ...]:
    """`_attend_cpu_backward` in plain products."""
    grad, query, out, lse = (x.float() for x in by_row)
    weights = (_block_scores(query, key, mask) - lse[..., None]).exp()
    grad_scores = grad @ value.float().mT
    grad_scores -= (grad * out).sum(-1, keepdim=True)
    grad_scores *= weights * query.shape[-1] ** -0.5
    return grad_scores @ key.float(), grad_scores.mT @ query, weights.mT @ grad


def _block_scores(query: Tensor, key: Tensor, mask: Mask) -> Tensor:
    """Scaled scores [Hkv, r*G, s] in float32: for devices without the CPU's flash kernel."""
    scores = query.float() @ key.float().mT * query.shape[-1] ** -0.5
    return scores if mask is None else scores + mask


class _Masks:
    """The causal masks of a batch's squares: all are the corner of one."""

    def __init__(self, blocks: Sequence[Block], query: Tensor) -> None:
        """`query` [Hkv, R, G, d]."""
        self.groups = query.shape[2]
        largest = max((b.rows.stop - b.rows.start for b in blocks if b.causal), default=0)
        rows = torch.arange(largest, device=query.device)
        later = rows[:, None].repeat_interleave(self.groups, dim=0) < rows  # [r*G, r]
        self.whole = query.new_zeros(later.shape).masked_fill_(later, -torch.inf)

    def of(self, block: Block) -> Mask:
        """[r*G, r] for a square, None for a rectangle."""
        slots = block.rows.stop - block.rows.start
        return self.whole[: slots * self.groups, :slots] if block.causal else None


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Fold another part of the same softmax into `out` [..., d] and `lse` [...], in place.

    The part's share is exp(part_lse) / (exp(lse) + exp(part_lse)) = sigmoid(part_lse - lse).
    """
    out.lerp_(part.to(out.dtype), torch.sigmoid(part_lse - lse)[..., None])
    torch.logaddexp(lse, part_lse, out=lse)


class ChainAttention(torch.autograd.Function):
    """Softmax attention over step-0 keys (blocks) and the slot's own chain (diagonals).

    A slot's chain contributes one key a step, so its scores are elementwise products; they join
    the blocks by log-sum-exp. `apply(query, key, value, blocks, key_1, value_1, key_2, ...)` with
    query [R, Hq, d], key and value [T, Hkv, d], chain members [R, Hkv, d] gives [R, Hq, d].

    Inside, heads come first and the G queries that share a key are rows of one product:
    [Hkv, r*G, d]. A kernel is faster over fewer, taller blocks.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[Block], *chain: Tensor
    ) -> Tensor:
        precision = torch.promote_types(query.dtype, torch.float32)
        query = _grouped(query, key.shape[1])  # [Hkv, R, G, d]
        out = query.new_zeros(query.shape, dtype=precision)
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=precision)
        attend = _attend_cpu if query.is_cpu else _attend_anywhere
        masks = _Masks(blocks, query)
        keys, values = key.transpose(0, 1), value.transpose(0, 1)
        with torch.autocast(query.device.type, enabled=False):
            for block in blocks:
                rows = query[:, block.rows].flatten(1, 2)
                seen = keys[:, block.keys], values[:, block.keys]
                part, part_lse = attend(rows, *seen, masks.of(block))
                rows_out, rows_lse = out[:, block.rows], lse[:, block.rows]
                _merge(rows_out, rows_lse, part.view_as(rows_out), part_lse.view_as(rows_lse))
        scores = [_pair(query, member) * query.shape[-1] ** -0.5 for member in chain[::2]]
        for score, member in zip(scores, chain[1::2], strict=True):
            _merge(out, lse, _member(member), score)
        out = out.to(query.dtype).transpose(0, 1).flatten(1, 2)
        ctx.blocks, ctx.masks = blocks, masks
        ctx.save_for_backward(query, key, value, out, lse, *scores, *chain)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *rest = ctx.saved_tensors
        scores, chain = rest[: len(rest) // 3], rest[len(rest) // 3 :]
        grad, out = (_grouped(x, key.shape[1]) for x in (grad, out))
        keys, values = key.transpose(0, 1), value.transpose(0, 1)
        grad_query, grad_key, grad_value = (
            torch.zeros_like(x, dtype=lse.dtype) for x in (query, keys, values)
        )
        attend_backward = _attend_cpu_backward if query.is_cpu else _attend_anywhere_backward
        for block in ctx.blocks:
            by_row = [x[:, block.rows].flatten(1, 2) for x in (grad, query, out, lse)]
            seen = keys[:, block.keys], values[:, block.keys]
            parts = attend_backward(by_row, *seen, ctx.masks.of(block))
            rows = grad_query[:, block.rows]
            rows += parts[0].view_as(rows)
            grad_key[:, block.keys] += parts[1]
            grad_value[:, block.keys] += parts[2]
        delta = (grad * out).sum(-1, dtype=lse.dtype)  # [Hkv, R, G]
        chain_grads = []
        for score, chain_key, chain_value in zip(scores, chain[::2], chain[1::2], strict=True):
            weight = (score - lse).exp_()
            grad_score = _pair(grad, chain_value).sub_(delta)
            grad_score.mul_(weight).mul_(query.shape[-1] ** -0.5)
            grad_query.addcmul_(grad_score[..., None], _member(chain_key))
            chain_grads += [_over_group(grad_score, query), _over_group(weight, grad)]
        grad_query = grad_query.transpose(0, 1).flatten(1, 2)
        returned = (grad_query, grad_key.transpose(0, 1), grad_value.transpose(0, 1))
        return (
            *(x.to(query.dtype) for x in returned),
            None,
            *(x.to(query.dtype) for x in chain_grads),
        )


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[R, Hq, d] to [Hkv, R, G, d], contiguous."""
    return x.unflatten(1, (kv_heads, -1)).transpose(0, 1).contiguous()


def _member(x: Tensor) -> Tensor:
    """A chain's keys or values [R, Hkv, d] as [Hkv, R, 1, d]."""
    return x.transpose(0, 1)[:, :, None]


def _pair(grouped: Tensor, member: Tensor) -> Tensor:
    """Dot products [Hkv, R, G] of grouped [Hkv, R, G, d] with member [R, Hkv, d]."""
    precision = torch.promote_types(grouped.dtype, torch.float32)
    return (grouped * _member(member)).sum(-1, dtype=precision)


def _over_group(factor: Tensor, grouped: Tensor) -> Tensor:
    """[R, Hkv, d]: grouped [Hkv, R, G, d] times factor [Hkv, R, G], summed over the group."""
    return (factor[..., None] * grouped).sum(2).transpose(0, 1)
