# SPDX-License-Identifier: Apache-2.0
"""Attention of a TTT step: step-0 keys of the same document, and the slot's own chain.

In: queries of the requested slots, keys and values of step 0 and of the chain, which rows see which
keys. Out: the attention output of each query. Cost: batched products over blocks of rows; a block's
weights are recomputed in the backward pass, so nothing of size rows x keys outlives its block.

A chain has one key per step and slot, and no two slots share it, so its scores are dot products.
They stand in columns before the step-0 keys, and one softmax (and one gradient) covers the row:

    own chain: step 1 .. step k, padded to c columns | the document's step-0 keys

Shapes: T packed tokens, R requested slots, r rows and s step-0 keys of a block, k chain members,
Hq / Hkv query / key heads, G = Hq / Hkv, d head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.train.kernels.blocks import Block, Document, round_up

# The chain's columns are padded to a multiple of this, so that most steps have the same shape. There
# is always padding: rows of scores a power of two apart would evict each other from the cache.
CHAIN_COLUMNS = 8


class ChainAttention(torch.autograd.Function):
    """Softmax attention over step-0 keys (blocks) and the slot's own chain (one key a step).

    `apply(query, key, value, documents, key_1, value_1, key_2, ...)` with query [R, Hq, d], key and
    value [T, Hkv, d], chain members [R, Hkv, d] gives [R, Hq, d].

    In a block the G queries that share a key are rows of one product: [Hkv, r*G, d].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: list[Document],
        *chain: Tensor,
    ) -> Tensor:
        query = query.unflatten(1, (key.shape[1], -1)) * query.shape[-1] ** -0.5  # [R, Hkv, G, d]
        out = torch.empty_like(query)
        chain_keys, chain_values = _joined(chain[::2], query), _joined(chain[1::2], query)
        with torch.autocast(query.device.type, enabled=False):
            own_scores = query @ chain_keys.mT  # [R, Hkv, G, c]
            own_scores[..., len(chain) // 2 :] = -torch.inf
            own_weights = torch.empty_like(own_scores)
            for document in documents:
                keys, values = (_columns(x, document, own_scores.shape[-1]) for x in (key, value))
                for block in document.blocks:
                    weights = _weights(block, query, keys, own_scores)  # [Hkv, r*G, c + s]
                    _put(out, block, weights @ values[:, : weights.shape[-1]])
                    _put(own_weights, block, weights)
            out += own_weights @ chain_values
        ctx.documents = documents
        ctx.save_for_backward(query, key, value, own_scores, *chain)
        return out.flatten(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, own_scores, *chain = ctx.saved_tensors
        chain_keys, chain_values = _joined(chain[::2], query), _joined(chain[1::2], query)
        grad = grad.reshape(query.shape)
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        own_grads = grad @ chain_values.mT  # of the weights, then of the scores: [R, Hkv, G, c]
        own_weights = torch.empty_like(own_scores)
        room = own_scores.shape[-1]
        for document in ctx.documents:
            keys, values = (_columns(x, document, room) for x in (key, value))
            # In float32 even where products are not, since many blocks add up in it.
            precision = torch.promote_types(keys.dtype, torch.float32)
            by_key, by_value = (torch.zeros_like(x, dtype=precision) for x in (keys, values))
            for block in document.blocks:
                weights = _weights(block, query, keys, own_scores)
                seen = slice(weights.shape[-1])
                block_grad = _rows(grad, block)
                grad_scores = block_grad @ values[:, seen].mT  # of the weights, so far
                grad_scores[..., :room] = _rows(own_grads, block)
                # The kernel of softmax's gradient, in place.
                torch.ops.aten._softmax_backward_data.out(
                    grad_scores, weights, -1, weights.dtype, grad_input=grad_scores
                )
                _put(grad_query, block, grad_scores @ keys[:, seen])
                _put(own_grads, block, grad_scores)
                _put(own_weights, block, weights)
                _add_product(by_key[:, seen], grad_scores.mT, _rows(query, block))
                _add_product(by_value[:, seen], weights.mT, block_grad)
            grad_key[document.tokens] = _tokens(by_key, document, room)
            grad_value[document.tokens] = _tokens(by_value, document, room)
        grad_query += own_grads @ chain_keys
        grad_query *= query.shape[-1] ** -0.5
        # [R, Hkv, 2c, d]: key_1, value_1, key_2, ...
        by_member = torch.stack((own_grads.mT @ query, own_weights.mT @ grad), dim=3).flatten(2, 3)
        chain_grads = by_member.unbind(2)[: len(chain)]
        return grad_query.flatten(1, 2), grad_key, grad_value, None, *chain_grads


def _columns(x: Tensor, document: Document, room: int) -> Tensor:
    """A document's keys or values from [T, Hkv, d] as [Hkv, c + s, d], zeros in front and behind."""
    own = x[document.tokens].transpose(0, 1)
    behind = max(document.blocks[-1].num_keys - own.shape[1], 0)
    return F.pad(own, (0, 0, room, behind))


def _tokens(by_column: Tensor, document: Document, room: int) -> Tensor:
    """The inverse of `_columns`: [Hkv, c + s, d] to the document's tokens [t, Hkv, d]."""
    tokens = document.tokens.stop - document.tokens.start
    return by_column[:, room : room + tokens].transpose(0, 1)


def _weights(block: Block, query: Tensor, keys: Tensor, own_scores: Tensor) -> Tensor:
    """[Hkv, r*G, c + s]: each row's softmax over its own chain and the step-0 keys that it sees."""
    seen = slice(own_scores.shape[-1] + block.num_keys)
    scores = _rows(query, block) @ keys[:, seen].mT
    scores[..., : own_scores.shape[-1]] = _rows(own_scores, block)
    last = scores.shape[-1] - block.later.shape[-1]
    ends = scores.unflatten(1, (len(block.later), -1))[..., last:]
    ends.masked_fill_(block.later, -torch.inf)
    return torch.softmax(scores, -1, out=scores)


def _rows(x: Tensor, block: Block) -> Tensor:
    """A block of [R, Hkv, G, n] as [Hkv, r*G, n], with zeros for the padding rows."""
    own = x[block.rows].transpose(0, 1)
    return F.pad(own, (0, 0, 0, 0, 0, len(block.later) - own.shape[1])).flatten(1, 2)


def _put(into: Tensor, block: Block, flat: Tensor) -> None:
    """The inverse of `_rows`: the first n columns of [Hkv, r*G, ...] into a block of [R, Hkv, G, n]."""
    own = into[block.rows]
    own.copy_(
        flat.unflatten(1, (len(block.later), -1))[:, : len(own), :, : own.shape[-1]].transpose(0, 1)
    )


def _joined(members: Sequence[Tensor], query: Tensor) -> Tensor:
    """The chain's keys or values, k times [R, Hkv, d], as [R, Hkv, c, d] with zeros behind."""
    rows, heads, _, size = query.shape
    joined = query.new_zeros(rows, heads, round_up(len(members) + 1, CHAIN_COLUMNS), size)
    for index, member in enumerate(members):
        joined[:, :, index] = member
    return joined


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` for batches of matrices, in one pass where the dtypes are equal."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += left @ right
