# SPDX-License-Identifier: Apache-2.0
"""The draft vocabulary: which D of the target's V tokens the draft head can propose.

Legend: D draft vocabulary, V target vocabulary. `d2t` holds *offsets*, as the engines read it:
`target_id = draft_id + d2t[draft_id]`; `t2d` marks the target ids that are in it.

Worked example, V = 6, counts [5, 0, 9, 1, 9, 1], D = 3: the most frequent ids are 2, 4 (nine each)
and 0, so in ascending order token_ids = [0, 2, 4], d2t = [0-0, 2-1, 4-2] = [0, 1, 2], and
t2d = [1, 0, 1, 0, 1, 0].
"""

import dataclasses
import tokenize
from pathlib import Path

import numpy as np
import torch

from shared.contracts.head_config import draft_vocab_too_large
from shared.errors import FOREIGN_ERRORS, UserError
from shared.io import files

D2T = "d2t.npy"
T2D = "t2d.npy"
# The header of an array is a Python literal, and parsing one fails in many ways.
_HEADER_ERRORS = (*FOREIGN_ERRORS, MemoryError, tokenize.TokenError)
_REMEDY = "Restore d2t.npy and t2d.npy, or delete both to make them again from dump's counts."


@dataclasses.dataclass(frozen=True)
class DraftVocab:
    """A checked draft vocabulary. It is part of the weights: lm_head's rows mean nothing without it."""

    d2t: torch.Tensor  # [D] int64 offsets
    t2d: torch.Tensor  # [V] bool

    @property
    def size(self) -> int:
        return self.d2t.numel()

    @property
    def token_ids(self) -> torch.Tensor:
        """[D] int64: the target id of each draft id, ascending."""
        return self.d2t + torch.arange(self.size)


def from_token_ids(token_ids: torch.Tensor, vocab_size: int) -> DraftVocab:
    """The vocabulary with these target ids ([D], ascending, distinct)."""
    token_ids = token_ids.to(torch.int64)
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[token_ids] = True
    vocab = DraftVocab(token_ids - torch.arange(token_ids.numel()), t2d)
    check(vocab)
    return vocab


def from_counts(counts: torch.Tensor, draft_vocab_size: int) -> DraftVocab:
    """The D most frequent tokens. Of equally frequent ones the lower id is taken.

    Args:
        counts: [V] int64, how often each token occurs in the answers.

    Raises:
        UserError: D exceeds V.
    """
    vocab_size = counts.numel()
    if draft_vocab_size > vocab_size:
        raise draft_vocab_too_large(draft_vocab_size, vocab_size)
    by_frequency = torch.sort(counts, descending=True, stable=True).indices
    return from_token_ids(by_frequency[:draft_vocab_size].sort().values, vocab_size)


def coverage(vocab: DraftVocab, counts: torch.Tensor) -> float:
    """Share of the counted tokens that the draft head can propose: sum(counts[t2d]) / sum(counts)."""
    return float(counts[vocab.t2d].sum()) / max(float(counts.sum()), 1.0)


def check(vocab: DraftVocab) -> None:
    """Refuse tensors that engines would not map as intended.

    Raises:
        UserError: wrong types, ids out of range or not ascending, or d2t and t2d disagree.
    """
    d2t, t2d = vocab.d2t, vocab.t2d
    if d2t.dtype != torch.int64 or t2d.dtype != torch.bool or d2t.dim() != 1 or t2d.dim() != 1:
        raise UserError(
            "expected d2t int64 [D] and t2d bool [V], found "
            f"{d2t.dtype} {list(d2t.shape)} and {t2d.dtype} {list(t2d.shape)}.",
            code="vocab-tensors",
            remedy=_REMEDY,
        )
    token_ids = vocab.token_ids
    ascending = bool((token_ids[1:] > token_ids[:-1]).all())
    inside = d2t.numel() > 0 and int(token_ids[0]) >= 0 and int(token_ids[-1]) < t2d.numel()
    if not ascending or not inside or not torch.equal(t2d.nonzero().flatten(), token_ids):
        raise UserError(
            "expected draft_id + d2t[draft_id] to be ascending and exactly the ids that t2d marks.",
            code="vocab-mapping",
            remedy=_REMEDY,
        )


def write(folder: Path, vocab: DraftVocab) -> None:
    """Write d2t.npy and t2d.npy into `folder`."""
    for name, tensor in ((D2T, vocab.d2t), (T2D, vocab.t2d)):
        with files.atomic_path(folder / name) as temporary, temporary.open("wb") as handle:
            np.save(handle, tensor.numpy())


def read(folder: Path) -> DraftVocab:
    """The checked vocabulary in `folder`.

    Raises:
        UserError: a file is missing or damaged, or the two do not fit each other.
    """
    vocab = DraftVocab(_read_array(folder / D2T), _read_array(folder / T2D))
    try:
        check(vocab)
    except UserError as error:
        raise UserError(
            f"{folder}: no valid draft vocabulary: {error.problem}",
            code=error.code,
            remedy=error.remedy,
            facts={"folder": str(folder)},
        ) from error
    return vocab


def _read_array(path: Path) -> torch.Tensor:
    files.require_file(path)
    try:
        # Mapped, so that a header that claims more than the file has is refused at once.
        return torch.from_numpy(np.array(np.load(path, mmap_mode="r", allow_pickle=False)))
    except _HEADER_ERRORS as error:
        raise UserError(
            f"{path}: expected an array of a draft vocabulary, found: {error}",
            code="vocab-unreadable",
            remedy=_REMEDY,
            facts={"file": str(path)},
        ) from error
