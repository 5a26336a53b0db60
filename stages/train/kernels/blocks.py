# SPDX-License-Identifier: Apache-2.0
"""Which rows of a batch's attention run together, and which keys they see.

A block is computed whole and masked where a key comes after a row's own slot, so slots of a block
are near each other. Rows and keys are counted up to round numbers (the rest is masked): a CPU makes
new code for each shape of a bfloat16 product, at the price of a product or two.
"""

import bisect
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

# Slots of a block are less than so many tokens apart: half as many keys a row are waste.
SPAN_TOKENS = 192
# An accelerator wants fewer, larger products.
ACCELERATOR_SPAN_TOKENS = 1024
ROUND_ROWS = 32
ROUND_KEYS = 64


class Block(NamedTuple):
    """Rows of one document that attend together.

    Attributes:
        rows: of the R requested slots; r of them, counted up.
        num_keys: of step-0 keys, from the document's first to the last slot's, counted up: s.
        later: [r, 1, w] bool: which of the last w keys come after a row's own slot.
    """

    rows: slice
    num_keys: int
    later: Tensor


class Document(NamedTuple):
    """A document with requested slots: which tokens are its, and the blocks of its rows."""

    tokens: slice
    blocks: list[Block]


def attention_blocks(slots: Tensor, offsets: Tensor) -> list[Document]:
    """Cover "step-0 slots <= own slot, same document" with blocks of rows.

    Worked example, counting up to multiples of 2: documents of 8 and 2 tokens, slots [3, 4, 6]. The
    second document has no slot. The three are one block of r = 4 rows, of which the last is nobody's.
    It sees the keys 0 .. 6 and, counted up, 7. Of the last w = 4, keys 4 .. 7, all come after slot
    3, 5 .. 7 after slot 4, 7 after slot 6.

    Args:
        slots: [R] int64, ascending.
        offsets: [N+1] int64.
    """
    span = SPAN_TOKENS if slots.is_cpu else ACCELERATOR_SPAN_TOKENS
    own, ends = slots.tolist(), offsets.tolist()  # once, not a wait for the device at each block
    documents, row = [], 0
    for start, stop in itertools.pairwise(ends):
        blocks = []
        while row < len(own) and own[row] < stop:
            until = bisect.bisect_left(own, min(own[row] + span, stop), row)
            num_keys = round_up(own[until - 1] + 1 - start, ROUND_KEYS)
            later = _later(slots[row:until], own[row] + 1, start + num_keys)
            blocks.append(Block(slice(row, until), num_keys, later))
            row = until
        if blocks:
            documents.append(Document(slice(start, stop), blocks))
    return documents


def _later(slots: Tensor, first: int, stop: int) -> Tensor:
    """[r, 1, w] bool: which of the keys first .. stop - 1 come after each slot; rows counted up."""
    later = torch.arange(first, stop, device=slots.device) > slots[:, None]
    rows = later.new_zeros(round_up(len(slots), ROUND_ROWS), 1, later.shape[1])
    rows[: len(slots), 0] = later
    return rows


def round_up(number: int, step: int) -> int:
    """The next multiple of `step`, 0 of 0."""
    return -(-number // step) * step
