# SPDX-License-Identifier: Apache-2.0
"""`init_from`: another training begins with the weights of an exported head, and its vocabulary.

Not a resume, which continues the same training: step, optimizer and data position start anew. The
vocabulary is kept, since it says what the rows of lm_head mean.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import UserError
from shared.io import files
from shared.paths import require_input
from stages.train.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from stages.train.model import DraftHead

WEIGHTS = "model.safetensors"


def _folder(config: TrainConfig) -> Path:
    return require_input(str(config.init_from), config.workspace, label="train.init_from")


def fingerprint(config: TrainConfig) -> dict[str, str]:
    """The hash of the weights that are taken over, as an input of the artifact.

    Raises:
        UserError: no such folder, or it holds no weights.
    """
    if config.init_from is None:
        return {}
    path = _folder(config) / WEIGHTS
    if not path.is_file():
        raise UserError(f"train.init_from: expected an exported head, found no {path}.")
    return {"init_from": files.sha256(path)}


def load(config: TrainConfig, embed_tokens: "Tensor") -> "DraftHead":
    """The head of `init_from`.

    Raises:
        UserError: it is no head for this target, or for another size of vocabulary.
    """
    from stages.train.model import load_head

    head = load_head(_folder(config), embed_tokens)
    if head.config.draft_vocab_size != config.run.draft_vocab_size:
        raise UserError(
            f"train.init_from keeps the vocabulary of {config.init_from}: expected "
            f"run.draft_vocab_size {head.config.draft_vocab_size} for it, found "
            f"{config.run.draft_vocab_size}."
        )
    return head


def copy(warm: "DraftHead", head: "DraftHead", name: str) -> None:
    """Take over the weights.

    Raises:
        UserError: the heads differ in shape, or were trained on other layers.
    """
    theirs, ours = dataclasses.asdict(warm.config), dataclasses.asdict(head.config)
    different = [
        f"{key}: {theirs[key]} there, {ours[key]} here" for key in ours if theirs[key] != ours[key]
    ]
    if different:
        raise UserError(
            f"train.init_from: {name} is another kind of head ({'; '.join(different)})."
        )
    head.load_state_dict(warm.state_dict())
