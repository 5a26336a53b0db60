# SPDX-License-Identifier: Apache-2.0
"""One number per token: the target's probability inside the draft vocabulary. Computed once, then cached.

It is 0 where the target's argmax is outside, which says that the token carries no loss.

It needs a product with the target's whole lm_head, which would be the largest of a training step. So
it is computed shard by shard before training, divided among the ranks, and kept in train's folder.
"""

import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
) -> Sequence[Tensor]:
    """For each shard [T] float16, 0 at tokens that no answer holds. Every rank calls it.

    Of shards that dump has yet to make, they are computed when they are asked for.

    Raises:
        UserError: a shard is damaged.
        RetryableError: another rank's are not there.
    """
    if dataset.followed:
        return _SharesOnArrival(dataset, head, tensors, folder, accelerator)
    own = range(accelerator.process_index, len(dataset.shards), accelerator.num_processes)
    if head.config.draft_vocab_size == head.config.vocab_size:
        for index in own:
            dataset.require_unchanged(index)
        return [torch.ones(len(shard.input_ids)).half() for shard in dataset.shards]
    key, whole = _key(head), _whole_output(tensors, accelerator)
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


class _SharesOnArrival(Sequence[Tensor]):
    """Those of shards that dump has yet to make. Each rank computes them; rank 0 keeps them."""

    def __init__(
        self,
        dataset: Dataset,
        head: DraftHead,
        tensors: TargetTensors,
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        self._shards, self._folder = dataset.shards, folder
        self._head, self._accelerator = head, accelerator
        self._is_full = head.config.draft_vocab_size == head.config.vocab_size
        self._key = "" if self._is_full else _key(head)
        self._whole = _whole_output(tensors, accelerator)
        self._made: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: Any) -> Any:
        if index not in self._made:
            self._made[index] = self._make(index)
        return self._made[index]

    def _make(self, index: int) -> Tensor:
        shard, path = self._shards[index], _path(self._folder, index)
        if self._is_full:
            return torch.ones(len(shard.input_ids)).half()
        if (cached := _read(path, self._key, shard)) is not None:
            return cached
        shares = _shares(shard, self._head, self._whole, self._accelerator.device)
        if self._accelerator.is_main_process:
            save_tensors(path, {"vocabulary": self._key, "shares": shares})
        return shares


def _key(head: DraftHead) -> str:
    return hashlib.sha256(head.d2t.cpu().numpy().tobytes()).hexdigest()


def _whole_output(tensors: TargetTensors, accelerator: Accelerator) -> TargetOutput:
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    return TargetOutput(
        norm=tensors.norm.to(accelerator.device),
        lm_head=tensors.lm_head.to(accelerator.device, dtype),
        logit_scale=tensors.logit_scale,
        softcap=tensors.softcap,
    )


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
