# SPDX-License-Identifier: Apache-2.0
"""Which rows of a batch's attention run together, and which keys they see.

A block is computed whole and masked where a key comes after a row's own slot, so the slots of a
block lie near each other. Rows and keys are padded to multiples of 32 and 64: a CPU generates code
for each new shape of a bfloat16 product, which costs as much as one or two products.
"""

import bisect
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

# Slots of a block are less than this many tokens apart; about half as many keys per row are waste.
SPAN_TOKENS = 192
# An accelerator runs fewer, larger products faster.
ACCELERATOR_SPAN_TOKENS = 1024
ROUND_ROWS = 32
ROUND_KEYS = 64


class Block(NamedTuple):
    """Rows of one document that attend together.

    Attributes:
        rows: which of the R requested slots; r is their number, padded.
        num_keys: step-0 keys, from the document's first to the last slot's own; s is padded.
        later: [r, 1, w] bool: which of the last w keys come after a row's own slot. Where a window
            narrows the view, w is s, and those before the window are marked too.
    """

    rows: slice
    num_keys: int
    later: Tensor


class Document(NamedTuple):
    """A document with requested slots: its tokens, and the blocks of its rows."""

    tokens: slice
    blocks: list[Block]


def attention_blocks(slots: Tensor, offsets: Tensor) -> list[Document]:
    """Cover "step-0 slots <= own slot, same document" with blocks of rows.

    Worked example, padding to multiples of 2: documents of 8 and 2 tokens, slots [3, 4, 6]. The
    second document has no slot. The three slots are one block of r = 4 rows, the last one padding.
    It sees the keys 0 .. 6, and 7 as padding. Of the last w = 4 keys, 4 .. 7, all come after slot 3,
    5 .. 7 after slot 4, and 7 after slot 6.

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
    """[r, 1, w] bool: which of the keys first .. stop - 1 come after each slot; rows padded."""
    later = torch.arange(first, stop, device=slots.device) > slots[:, None]
    rows = later.new_zeros(round_up(len(slots), ROUND_ROWS), 1, later.shape[1])
    rows[: len(slots), 0] = later
    return rows


def narrowed(documents: list[Document], slots: Tensor, reach: int) -> list[Document]:
    """The same blocks, each row seeing only the last `reach` keys up to its own slot's.

    Worked example, reach 2: slot 4 of a document of 8 tokens sees the keys 3 and 4. The others are
    masked, not skipped: a window saves no time here, as it does in the kernels of an accelerator.
    """
    return [
        Document(
            tokens, [_narrowed(block, slots[block.rows] - tokens.start, reach) for block in blocks]
        )
        for tokens, blocks in documents
    ]


def narrowed_starts(starts: Tensor, slots: Tensor, reach: int) -> Tensor:
    """[R] the first key that each row of the kernels sees, not before its document's `starts` [R]."""
    return torch.maximum(starts, slots + (1 - reach))


def _narrowed(block: Block, own: Tensor, reach: int) -> Block:
    hidden = block.later.new_zeros(len(block.later), 1, block.num_keys)
    hidden[..., block.num_keys - block.later.shape[-1] :] = block.later
    keys = torch.arange(block.num_keys, device=own.device)
    hidden[: len(own), 0] |= keys <= own[:, None] - reach
    return block._replace(later=hidden)


def round_up(number: int, step: int) -> int:
    """The next multiple of `step`, 0 of 0."""
    return -(-number // step) * step
