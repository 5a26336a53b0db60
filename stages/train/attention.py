# SPDX-License-Identifier: Apache-2.0
"""Attention of a TTT step: step-0 keys of the same document, and the slot's own chain.

The causal part runs as blocks of a flash kernel that also returns log-sum-exp; a chain contributes
one key a step, so its scores are elementwise products; both join by log-sum-exp. No [T, T] tensor
on a CPU, forward or backward.

Shapes: T packed tokens, N documents, R requested slots, r rows and s keys of a block, Hq / Hkv
query / key heads, G = Hq / Hkv, d head size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from shared.head_config import HeadConfig


class Block(NamedTuple):
    """Query rows that attend to one range of step-0 keys: wholly, or causally as a square."""

    rows: slice
    keys: slice
    causal: bool


def attention_blocks(slots: Tensor, offsets: Tensor) -> list[Block]:
    """Cover "step-0 slots <= own slot, same document" with rectangles and causal squares.

    Worked example: one document of 8 tokens, slots [3, 4, 6] make two runs of neighbours.
    Run 3..4 is rows 0:2 with the square keys 3:5 and the rectangle keys 0:3; run 6 is row 2:3
    with the square keys 6:7 and the rectangle keys 0:6.

    Args:
        slots: [R] int64, ascending.
        offsets: [N+1] int64.
    """
    if not len(slots):
        return []
    documents = torch.bucketize(slots, offsets, right=True) - 1  # [R]
    breaks = (slots[1:] != slots[:-1] + 1) | (documents[1:] != documents[:-1])
    starts = [0, *(breaks.nonzero().flatten() + 1).tolist()]
    firsts = slots[starts].tolist()
    document_starts = offsets[documents[starts]].tolist()
    blocks = []
    for start, stop, first, document_start in zip(
        starts, [*starts[1:], len(slots)], firsts, document_starts, strict=True
    ):
        rows = slice(start, stop)
        blocks.append(Block(rows, slice(first, first + stop - start), causal=True))
        if document_start < first:
            blocks.append(Block(rows, slice(document_start, first), causal=False))
    return blocks


def _attend_cpu(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """One block: query [r, Hq, d], key [s, Hkv, d] to output [r, Hq, d], log-sum-exp [r, Hq]."""
    heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *heads_first, is_causal=causal
    )
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _attend_cpu_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, given the output and log-sum-exp of the WHOLE attention row.

    With those two, exp(score - lse) is the block's share of the whole row's softmax, so blocks
    need no gradient of their own through the merge.
    """
    heads_first = (x.transpose(0, 1)[None] for x in (grad, query, key, value, out, lse))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads_first, 0.0, causal
    )
    grad_query, grad_key, grad_value = (x[0].transpose(0, 1) for x in grads)
    return grad_query, grad_key, grad_value


def _attend_anywhere(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """`_attend_cpu` in plain products, for other devices: the block's scores are stored."""
    scores = _block_scores(query, key, causal=causal)  # [Hkv, G, r, s]
    lse = scores.logsumexp(-1)
    out = torch.einsum("hgrs,shd->rhgd", (scores - lse[..., None]).exp(), value.float())
    return out.flatten(1, 2), lse.flatten(0, 1).t()


def _attend_anywhere_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_attend_cpu_backward` in plain products."""
    groups = (key.shape[1], -1)
    row_lse = lse.t().unflatten(0, groups)[..., None]  # [Hkv, G, r, 1]
    weights = (_block_scores(query, key, causal=causal) - row_lse).exp()
    grad, out = (x.float().unflatten(1, groups) for x in (grad, out))  # [r, Hkv, G, d]
    grad_scores = torch.einsum("rhgd,shd->hgrs", grad, value.float())
    grad_scores -= (grad * out).sum(-1).permute(1, 2, 0)[..., None]
    grad_scores *= weights * query.shape[-1] ** -0.5
    grad_query = torch.einsum("hgrs,shd->rhgd", grad_scores, key.float()).flatten(1, 2)
    grad_key = torch.einsum("hgrs,rhgd->shd", grad_scores, query.float().unflatten(1, groups))
    return grad_query, grad_key, torch.einsum("hgrs,rhgd->shd", weights, grad)


def _block_scores(query: Tensor, key: Tensor, *, causal: bool) -> Tensor:
    """Scaled scores [Hkv, G, r, s] in float32: for devices without the CPU's flash kernel."""
    grouped = query.unflatten(1, (key.shape[1], -1)).float()
    scores = torch.einsum("rhgd,shd->hgrs", grouped, key.float()) * query.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores.masked_fill_(later, -torch.inf)
    return scores


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Fold another part of the same softmax into `out` [r, Hq, d] and `lse` [r, Hq], in place."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp()[..., None]).add_(part * (part_lse - total).exp()[..., None])
    lse.copy_(total)


class ChainAttention(torch.autograd.Function):
    """Softmax attention over step-0 keys (blocks) and the slot's own chain (diagonals).

    A slot's chain contributes one key a step, so its scores are elementwise products; they join
    the blocks by log-sum-exp. `apply(query, key, value, blocks, key_1, value_1, key_2, ...)` with
    query [R, Hq, d], key and value [T, Hkv, d], chain members [R, Hkv, d] gives [R, Hq, d].
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[Block], *chain: Tensor
    ) -> Tensor:
        precision = torch.promote_types(query.dtype, torch.float32)
        out = query.new_zeros(query.shape, dtype=precision)
        lse = query.new_full(query.shape[:2], -torch.inf, dtype=precision)
        attend = _attend_cpu if query.is_cpu else _attend_anywhere
        with torch.autocast(query.device.type, enabled=False):
            for rows, keys, causal in blocks:
                part = attend(query[rows], key[keys], value[keys], causal=causal)
                _merge(out[rows], lse[rows], *part)
        groups = query.shape[1] // key.shape[1]
        for chain_key, chain_value in zip(chain[::2], chain[1::2], strict=True):
            score = _chain_score(query, chain_key)
            _merge(out, lse, chain_value.repeat_interleave(groups, dim=1), score)
        out = out.to(query.dtype)
        ctx.blocks = blocks
        ctx.save_for_backward(query, key, value, out, lse, *chain)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *chain = ctx.saved_tensors
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value)]
        grad_query = grads[0]
        attend_backward = _attend_cpu_backward if query.is_cpu else _attend_anywhere_backward
        for rows, keys, causal in ctx.blocks:
            block_grads = attend_backward(
                grad[rows], query[rows], key[keys], value[keys], out[rows], lse[rows], causal=causal
            )
            for total, where, part in zip(grads, (rows, keys, keys), block_grads, strict=True):
                total[where] += part
        groups = (key.shape[1], -1)
        grouped_grad, grouped_query = grad.unflatten(1, groups), query.unflatten(1, groups)
        delta = (grad * out).sum(-1, dtype=lse.dtype)  # [R, Hq]
        chain_grads = []
        for chain_key, chain_value in zip(chain[::2], chain[1::2], strict=True):
            weight = (_chain_score(query, chain_key) - lse).exp()  # [R, Hq]
            grad_score = _pair(grouped_grad, chain_value) - delta
            grad_score *= weight * query.shape[-1] ** -0.5
            weight, grad_score = (x.unflatten(1, groups)[..., None] for x in (weight, grad_score))
            grad_query.unflatten(1, groups).add_(grad_score * chain_key[:, :, None])
            chain_grads += [(grad_score * grouped_query).sum(2), (weight * grouped_grad).sum(2)]
        returned = (*grads, None, *chain_grads)
        return tuple(None if x is None else x.to(query.dtype) for x in returned)


def _pair(grouped: Tensor, member: Tensor) -> Tensor:
    """Dot products [R, Hq] of grouped [R, Hkv, G, d] with member [R, Hkv, d]."""
    precision = torch.promote_types(grouped.dtype, torch.float32)
    return (grouped * member[:, :, None]).sum(-1, dtype=precision).flatten(1)


def _chain_score(query: Tensor, chain_key: Tensor) -> Tensor:
    """Scaled scores [R, Hq] of each slot's query against its own chain's key."""
    return _pair(query.unflatten(1, (chain_key.shape[1], -1)), chain_key) * query.shape[-1] ** -0.5


class Rotary:
    """transformers' rotary embedding with the config's scaling variant.

    Not a module of the head, so that `head.to(torch.bfloat16)` leaves its frequencies in float32.
    """

    def __init__(self, config: HeadConfig) -> None:
        self._embedding = LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rope_theta=config.rope_theta,
                rope_scaling=dict(config.rope_scaling) if config.rope_scaling else None,
            )
        )

    def table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each [n, 1, d], for positions [n]."""
        self._embedding.to(positions.device)
        like = torch.empty(
            0, device=positions.device, dtype=torch.promote_types(dtype, torch.float32)
        )
        cos, sin = self._embedding(like, positions[None])
        return cos[0, :, None].to(dtype), sin[0, :, None].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [n, heads, d] by cos and sin [n, 1, d]; halves, not interleaved pairs."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
