# SPDX-License-Identifier: Apache-2.0
"""The draft vocabulary beside the head: made once from the answers' token counts, then kept.

It is part of the weights. A run that continues from a checkpoint reads the files that are there and
never makes them anew, so that a resumed head keeps the meaning of its rows.
"""

import logging
from pathlib import Path

import torch

from shared.contracts import vocab
from shared.contracts.vocab import DraftVocab
from shared.errors import UserError
from shared.io import files

logger = logging.getLogger(__name__)


def load_or_make(folder: Path, counts: torch.Tensor, draft_vocab_size: int) -> DraftVocab:
    """The vocabulary in `folder`, or a new one, written there.

    Raises:
        UserError: the files there do not fit each other or the recipe.
    """
    if _is_there(folder):
        draft = vocab.read(folder)
        if draft.size != draft_vocab_size or draft.t2d.numel() != counts.numel():
            raise UserError(
                f"{folder}: expected a draft vocabulary of {draft_vocab_size} of {counts.numel()} "
                f"tokens, found {draft.size} of {draft.t2d.numel()}. Give --overwrite to train anew."
            )
    else:
        draft = vocab.from_counts(counts, draft_vocab_size)
        vocab.write(folder, draft)
    share = vocab.coverage(draft, counts)
    logger.info("draft vocabulary: %d tokens hold %.2f %% of the answers", draft.size, 100 * share)
    return draft


def take_over(folder: Path, token_ids: torch.Tensor, vocab_size: int) -> None:
    """Put another head's vocabulary, [D] target ids, into `folder`.

    Raises:
        UserError: there is another one already.
    """
    draft = vocab.from_token_ids(token_ids, vocab_size)
    if _is_there(folder):
        if not torch.equal(vocab.read(folder).d2t, draft.d2t):
            raise UserError(
                f"{folder} holds another draft vocabulary than the head of train.init_from. "
                "Give --overwrite, or another run.name."
            )
        return
    vocab.write(folder, draft)


def forget_unbound(folder: Path) -> None:
    """Remove a vocabulary that no checkpoint's weights are bound to.

    It may be of another dump's counts: `stages.train vocab` makes one before any training.
    """
    states = folder / "checkpoints"
    if not any((states / name).exists() for name in ("latest.pt", "best.pt")):
        for name in (vocab.D2T, vocab.T2D):
            with files.writing(folder):
                (folder / name).unlink(missing_ok=True)


def _is_there(folder: Path) -> bool:
    return (folder / vocab.D2T).exists() and (folder / vocab.T2D).exists()
