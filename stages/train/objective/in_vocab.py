# SPDX-License-Identifier: Apache-2.0
"""One number per token: the target's probability inside the draft vocabulary. Computed once, then cached.

It is 0 where the target's argmax is outside, which says that the token carries no loss.

It needs a product with the target's whole lm_head, which would be the largest of a training step. So
it is computed shard by shard before training, divided among the ranks, and kept in train's folder.
"""

import hashlib
import logging
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from shared.contracts.hidden_states import Shard
from shared.contracts.row_files import RowFile
from shared.errors import RetryableError, UserError
from shared.io.tensor_files import is_dense, load_tensors, save_tensors
from shared.target.tensors import TargetTensors
from stages.train.data.dataset import Dataset
from stages.train.model import DraftHead
from stages.train.objective.target_output import TargetOutput, shares_in_vocab

LOG_EVERY_S = 10.0

logger = logging.getLogger(__name__)


def in_vocab_shares(
    dataset: Dataset,
    head: DraftHead,
    tensors: TargetTensors,
    folder: Path,
    accelerator: Accelerator,
) -> list[Tensor]:
    """For each shard [T] float16, 0 at tokens that no answer holds. Every rank calls it.

    Raises:
        UserError: a shard is damaged.
        RetryableError: another rank's are not there.
    """
    own = range(accelerator.process_index, len(dataset.shards), accelerator.num_processes)
    if head.config.draft_vocab_size == head.config.vocab_size:
        for index in own:
            dataset.require_unchanged(index)
        return [torch.ones(len(shard.input_ids)).half() for shard in dataset.shards]
    key = hashlib.sha256(head.d2t.cpu().numpy().tobytes()).hexdigest()
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    whole = TargetOutput(
        norm=tensors.norm.to(accelerator.device),
        lm_head=tensors.lm_head.to(accelerator.device, dtype),
        logit_scale=tensors.logit_scale,
        softcap=tensors.softcap,
    )
    logged_s = time.monotonic()
    for done, index in enumerate(own):
        path = _path(folder, index)
        if time.monotonic() - logged_s > LOG_EVERY_S:
            logged_s = time.monotonic()
            logger.info("checked the target's tokens of %d of %d files", done, len(own))
        if _read(path, key, dataset.shards[index]) is None:
            dataset.require_unchanged(index)  # this is the first pass over the file
            shares = _shares(dataset.shards[index], head, whole, accelerator.device)
            save_tensors(path, {"vocabulary": key, "shares": shares})
    accelerator.wait_for_everyone()
    return [_require(_path(folder, i), key, shard) for i, shard in enumerate(dataset.shards)]


def _require(path: Path, key: str, shard: Shard | RowFile) -> Tensor:
    shares = _read(path, key, shard)
    if shares is None:
        raise RetryableError(
            f"{path}: expected the numbers that another rank wrote just now, found none that fit.",
            code="rank-flags-missing",
            remedy="Mount the same workspace on all nodes and run the same command again.",
            facts={"file": str(path)},
        )
    return shares


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.pt"


def _read(path: Path, key: str, shard: Shard | RowFile) -> Tensor | None:
    """What is cached; None if it is missing, damaged, or of another vocabulary."""
    try:
        cached = load_tensors(path, label="cached shares", remedy="", mmap=False)
    except UserError:
        return None
    if not isinstance(cached, dict) or cached.get("vocabulary") != key:
        return None
    shares = cached.get("shares")
    is_whole = is_dense(shares, torch.float16) and shares.shape == shard.input_ids.shape
    return shares if is_whole else None


def _shares(
    shard: Shard | RowFile, head: DraftHead, whole: TargetOutput, device: torch.device
) -> Tensor:
    """[T] float16; only answer tokens are ever scored, so only they take the product."""
    answer = shard.loss_mask.bool()
    shares = torch.zeros(len(answer), dtype=torch.float16)
    finals = shard.final()[answer].to(device)
    shares[answer] = shares_in_vocab(finals, whole, head.t2d.to(device)).half().cpu()
    return shares
