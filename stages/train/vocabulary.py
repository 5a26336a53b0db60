# SPDX-License-Identifier: Apache-2.0
"""The draft vocabulary beside the head: made once from the answers' token counts, then kept.

It is part of the weights. A later run reads the files that are there and never makes them anew, so
that a resumed head keeps the meaning of its rows.
"""

import logging
import pickle
from pathlib import Path

import numpy as np
import torch

from shared import files, hidden_states, vocab
from shared.errors import UserError
from shared.vocab import DraftVocab

D2T = "d2t.npy"
T2D = "t2d.npy"

logger = logging.getLogger(__name__)


def read_counts(dump_folder: Path, vocab_size: int) -> torch.Tensor:
    """[V] int64: how often each token occurs in the answers.

    Raises:
        UserError: the file is missing, damaged, or of another vocabulary.
    """
    path = dump_folder / hidden_states.TOKEN_FREQ
    try:
        counts = torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: expected token counts: {str(error).splitlines()[0]}") from error
    if not isinstance(counts, torch.Tensor) or counts.shape != (vocab_size,):
        raise UserError(f"{path}: expected counts of {vocab_size} tokens. Run dump again.")
    return counts.to(torch.int64)


def load_or_make(folder: Path, counts: torch.Tensor, draft_vocab_size: int) -> DraftVocab:
    """The vocabulary in `folder`, or a new one, written there.

    Raises:
        UserError: the files there do not fit each other or the recipe.
    """
    d2t_path, t2d_path = folder / D2T, folder / T2D
    if d2t_path.exists() and t2d_path.exists():
        draft = _read(d2t_path, t2d_path)
        if draft.size != draft_vocab_size or draft.t2d.numel() != counts.numel():
            raise UserError(
                f"{folder}: expected a draft vocabulary of {draft_vocab_size} of {counts.numel()} "
                f"tokens, found {draft.size} of {draft.t2d.numel()}. Give --overwrite to train anew."
            )
    else:
        draft = vocab.from_counts(counts, draft_vocab_size)
        _write(folder, draft)
    share = vocab.coverage(draft, counts)
    logger.info("draft vocabulary: %d tokens hold %.2f %% of the answers", draft.size, 100 * share)
    return draft


def take_over(folder: Path, token_ids: torch.Tensor, vocab_size: int) -> None:
    """Put another head's vocabulary, [D] target ids, into `folder`.

    Raises:
        UserError: there is another one already.
    """
    draft = vocab.from_token_ids(token_ids, vocab_size)
    if (folder / D2T).exists() and (folder / T2D).exists():
        if not torch.equal(_read(folder / D2T, folder / T2D).d2t, draft.d2t):
            raise UserError(
                f"{folder} holds another draft vocabulary than the head of train.init_from. "
                "Give --overwrite, or another run.name."
            )
        return
    _write(folder, draft)


def _write(folder: Path, draft: DraftVocab) -> None:
    for name, tensor in ((D2T, draft.d2t), (T2D, draft.t2d)):
        with files.atomic_path(folder / name) as temporary, temporary.open("wb") as handle:
            np.save(handle, tensor.numpy())


def _read(d2t_path: Path, t2d_path: Path) -> DraftVocab:
    try:
        d2t = torch.from_numpy(np.load(d2t_path, allow_pickle=False))
        t2d = torch.from_numpy(np.load(t2d_path, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{d2t_path.parent}: unreadable draft vocabulary: {error}") from error
    draft = DraftVocab(d2t, t2d)
    vocab.check(draft)
    return draft
