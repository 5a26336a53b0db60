# SPDX-License-Identifier: Apache-2.0
"""One number per token: the target's probability inside the draft vocabulary. Computed once, then cached.

It is 0 where the target's argmax is outside, which says that the token carries no loss.

It needs a product with the target's whole lm_head, 2 H V FLOP a token, which would be the largest of
a training step. So it is computed shard by shard before training, divided among the ranks, and kept in
train's folder.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from shared.contracts.hidden_states import Shard
from shared.contracts.row_files import RowFile
from shared.errors import RetryableError, UserError
from shared.io.tensor_files import is_dense, load_tensors, save_tensors
from shared.runtime.process import stop_if_requested
from shared.runtime.status import Status
from shared.target.tensors import TargetTensors
from stages.train.data.dataset import Dataset
from stages.train.model import DraftHead
from stages.train.objective.target_output import CHUNK_ROWS, SharesInVocab, TargetOutput

_SAVED = "no step was made yet; what was computed for whole files is kept"

logger = logging.getLogger(__name__)


def in_vocab_shares(
    dataset: Dataset,
    head: DraftHead,
    tensors: TargetTensors,
    folder: Path,
    accelerator: Accelerator,
    status: Status,
) -> Sequence[Tensor]:
    """For each shard [T] float16, 0 at tokens that no answer holds. Every rank calls it.

    Of shards that dump has yet to make, they are computed when they are asked for.

    Raises:
        UserError: a shard is damaged.
        RetryableError: another rank's are not there.
        Stopped: a signal asked for it.
    """
    if dataset.followed:
        return _SharesOnArrival(dataset, head, tensors, folder, accelerator)
    own = range(accelerator.process_index, len(dataset.shards), accelerator.num_processes)
    if head.config.draft_vocab_size == head.config.vocab_size:
        for done, index in enumerate(own):
            stop_if_requested(_SAVED)
            status.progress(done, len(own), "checked files")
            dataset.require_unchanged(index)
        return [torch.ones(len(shard.input_ids)).half() for shard in dataset.shards]
    key = _key(head)
    missing = [i for i in own if _read(_path(folder, i), key, dataset.shards[i]) is None]
    if missing:
        find = SharesInVocab(TargetOutput.of(tensors, accelerator), head.t2d.to(accelerator.device))
        _make(dataset, missing, find, folder, key, status)
        del find  # its buffers
    accelerator.wait_for_everyone()
    return [_require(_path(folder, i), key, shard) for i, shard in enumerate(dataset.shards)]


def _make(
    dataset: Dataset,
    missing: Sequence[int],
    find: SharesInVocab,
    folder: Path,
    key: str,
    status: Status,
) -> None:
    """Compute and keep those of some shards."""
    total, done = sum(int(dataset.shards[index].loss_mask.sum()) for index in missing), 0
    logger.info(
        "before the first step: the target's probability of the draft vocabulary at %d answer "
        "tokens, once for these states",
        total,
    )
    started_s = time.monotonic()

    def tell(tokens: int) -> None:
        nonlocal done
        done += tokens
        stop_if_requested(_SAVED)
        status.progress(done, total, "answer tokens")

    for index in missing:
        dataset.require_unchanged(index)  # this is the first pass over the file
        shares = _shares(dataset.shards[index], find, tell)
        save_tensors(_path(folder, index), {"vocabulary": key, "shares": shares})
    logger.info("%.0f s; they are kept in %s", time.monotonic() - started_s, folder)


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
        self._accelerator = accelerator
        self._is_full = head.config.draft_vocab_size == head.config.vocab_size
        if not self._is_full:
            whole, inside = TargetOutput.of(tensors, accelerator), head.t2d.to(accelerator.device)
            self._key, self._find = _key(head), SharesInVocab(whole, inside)
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
        shares = _shares(shard, self._find)
        if self._accelerator.is_main_process:
            save_tensors(path, {"vocabulary": self._key, "shares": shares})
        return shares


def _key(head: DraftHead) -> str:
    return hashlib.sha256(head.d2t.cpu().numpy().tobytes()).hexdigest()


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
    shard: Shard | RowFile, find: SharesInVocab, tell: Callable[[int], None] = lambda _: None
) -> Tensor:
    """[T] float16; only answer tokens are ever scored, so only they take the product.

    Args:
        tell: called with the number of tokens that were done.
    """
    shares = torch.zeros(len(shard.loss_mask), dtype=torch.float16)
    finals = shard.final()
    for rows in shard.loss_mask.nonzero().flatten().split(CHUNK_ROWS):
        shares[rows] = find(finals[rows]).half().cpu()
        tell(len(rows))
    return shares
