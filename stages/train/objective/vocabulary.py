# SPDX-License-Identifier: Apache-2.0
"""The draft vocabulary in train's folder: made once from the answers' token counts, then kept.

It is part of the weights. A resumed run reads the files and never makes them again, so that the rows
of lm_head keep their meaning.
"""

import logging
from pathlib import Path

import torch

from shared.contracts import vocab
from shared.contracts.vocab import DraftVocab
from shared.errors import UserError
from shared.io import files

LOW_SHARE = 0.9  # of the answers' tokens

logger = logging.getLogger(__name__)


def load_or_make(folder: Path, counts: torch.Tensor, draft_vocab_size: int) -> DraftVocab:
    """The vocabulary in `folder`; made and written there if it does not exist.

    Raises:
        UserError: the files do not fit each other or the recipe.
    """
    if _is_there(folder):
        draft = vocab.read(folder)
        if draft.size != draft_vocab_size or draft.t2d.numel() != counts.numel():
            raise UserError(
                f"{folder}: expected a draft vocabulary of {draft_vocab_size} of {counts.numel()} "
                f"tokens, found {draft.size} of {draft.t2d.numel()}.",
                code="vocab-other-size",
                remedy="Give --overwrite to train from the start.",
                facts={"expected": draft_vocab_size, "found": draft.size},
            )
    else:
        draft = vocab.from_counts(counts, draft_vocab_size)
        vocab.write(folder, draft)
    share = vocab.coverage(draft, counts)
    logger.info("draft vocabulary: %d tokens hold %.2f %% of the answers", draft.size, 100 * share)
    if share < LOW_SHARE:
        logger.warning(
            "every token outside the draft vocabulary ends a draft: raise run.draft_vocab_size, or, where a "
            "warm start brought this vocabulary, train a new head instead"
        )
    return draft


def take_over(folder: Path, token_ids: torch.Tensor, vocab_size: int) -> None:
    """Write the vocabulary of another head, [D] target ids, into `folder`.

    Raises:
        UserError: `folder` has a different one.
    """
    draft = vocab.from_token_ids(token_ids, vocab_size)
    if _is_there(folder):
        if not torch.equal(vocab.read(folder).d2t, draft.d2t):
            raise UserError(
                f"{folder}: expected the draft vocabulary of train.init_from, found a different one.",
                code="vocab-not-init-from",
                remedy="Give --overwrite, or another run.name.",
                facts={"folder": str(folder)},
            )
        return
    vocab.write(folder, draft)


def forget_unbound(folder: Path) -> None:
    """Remove a vocabulary that no checkpoint depends on.

    `stages.train vocab` makes one before any training, maybe from the counts of another dump.
    """
    states = folder / "checkpoints"
    if not any((states / name).exists() for name in ("latest.pt", "best.pt")):
        for name in (vocab.D2T, vocab.T2D):
            with files.writing(folder):
                (folder / name).unlink(missing_ok=True)


def _is_there(folder: Path) -> bool:
    return (folder / vocab.D2T).exists() and (folder / vocab.T2D).exists()
