# SPDX-License-Identifier: Apache-2.0
"""One bit per token: is the target's argmax in the draft vocabulary? Computed once, then cached.

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
from stages.train.objective.target_output import target_argmax

LOG_EVERY_S = 10.0

logger = logging.getLogger(__name__)


def in_vocab_flags(
    dataset: Dataset,
    head: DraftHead,
    tensors: TargetTensors,
    folder: Path,
    accelerator: Accelerator,
) -> list[Tensor]:
    """For each shard [T] bool, False at tokens that no answer holds. Every rank calls it.

    Raises:
        UserError: a shard is damaged.
        RetryableError: another rank's flags are not there.
    """
    own = range(accelerator.process_index, len(dataset.shards), accelerator.num_processes)
    if head.config.draft_vocab_size == head.config.vocab_size:
        for index in own:
            dataset.require_unchanged(index)
        return [torch.ones(len(shard.input_ids), dtype=torch.bool) for shard in dataset.shards]
    key = hashlib.sha256(head.d2t.cpu().numpy().tobytes()).hexdigest()
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    lm_head = tensors.lm_head.to(accelerator.device, dtype)
    logged_s = time.monotonic()
    for done, index in enumerate(own):
        path = _path(folder, index)
        if time.monotonic() - logged_s > LOG_EVERY_S:
            logged_s = time.monotonic()
            logger.info("checked the target's tokens of %d of %d files", done, len(own))
        if _read(path, key, dataset.shards[index]) is None:
            dataset.require_unchanged(index)  # this is the first pass over the file
            flags = _flags(dataset.shards[index], head, tensors, lm_head, accelerator.device)
            save_tensors(path, {"vocabulary": key, "flags": flags})
    accelerator.wait_for_everyone()
    return [_require(_path(folder, i), key, shard) for i, shard in enumerate(dataset.shards)]


def _require(path: Path, key: str, shard: Shard | RowFile) -> Tensor:
    flags = _read(path, key, shard)
    if flags is None:
        raise RetryableError(
            f"{path}: expected the flags that another rank wrote just now, found none that fit.",
            code="rank-flags-missing",
            remedy="Mount the same workspace on all nodes and run the same command again.",
            facts={"file": str(path)},
        )
    return flags


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.pt"


def _read(path: Path, key: str, shard: Shard | RowFile) -> Tensor | None:
    """The cached flags; None if they are missing, damaged, or of another vocabulary."""
    try:
        cached = load_tensors(path, label="cached flags", remedy="", mmap=False)
    except UserError:
        return None
    if not isinstance(cached, dict) or cached.get("vocabulary") != key:
        return None
    flags = cached.get("flags")
    whole = is_dense(flags, torch.bool) and flags.shape == shard.input_ids.shape
    return flags if whole else None


def _flags(
    shard: Shard | RowFile,
    head: DraftHead,
    tensors: TargetTensors,
    lm_head: Tensor,
    device: torch.device,
) -> Tensor:
    """[T] bool; only answer tokens are ever scored, so only they take the product."""
    answer = shard.loss_mask.bool()
    best = target_argmax(
        shard.final()[answer].to(device),
        norm=tensors.norm.to(device),
        lm_head=lm_head,
    )
    flags = torch.zeros(len(answer), dtype=torch.bool)
    flags[answer] = head.t2d[best].cpu()
    return flags
