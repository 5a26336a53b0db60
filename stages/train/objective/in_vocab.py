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
    """For each shard [T] float16, 0 at tokens that no answer of a used sample holds. Every rank calls it.

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
    keys = [_key(head, dataset.used(index)) for index in range(len(dataset.shards))]
    missing = [i for i in own if _read(_path(folder, i), keys[i], dataset.shards[i]) is None]
    if missing:
        find = SharesInVocab(TargetOutput.of(tensors, accelerator), head.t2d.to(accelerator.device))
        _make(dataset, missing, find, folder, keys, status)
        del find  # its buffers
    accelerator.wait_for_everyone()
    return [_require(_path(folder, i), keys[i], shard) for i, shard in enumerate(dataset.shards)]


def _make(
    dataset: Dataset,
    missing: Sequence[int],
    find: SharesInVocab,
    folder: Path,
    keys: Sequence[str],
    status: Status,
) -> None:
    """Compute and keep those of some shards."""
    total, done = sum(int(_scored(dataset, index).sum()) for index in missing), 0
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
        shares = _shares(dataset, index, find, tell)
        save_tensors(_path(folder, index), {"made_for": keys[index], "shares": shares})
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
        self._dataset, self._folder = dataset, folder
        self._accelerator = accelerator
        self._is_full = head.config.draft_vocab_size == head.config.vocab_size
        if not self._is_full:
            whole, inside = TargetOutput.of(tensors, accelerator), head.t2d.to(accelerator.device)
            self._head, self._find = head, SharesInVocab(whole, inside)
        self._made: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._dataset.shards)

    def __getitem__(self, index: Any) -> Any:
        if index not in self._made:
            self._made[index] = self._make(index)
        return self._made[index]

    def _make(self, index: int) -> Tensor:
        shard, path = self._dataset.shards[index], _path(self._folder, index)
        if self._is_full:
            return torch.ones(len(shard.input_ids)).half()
        key = _key(self._head, self._dataset.used(index))
        if (cached := _read(path, key, shard)) is not None:
            return cached
        shares = _shares(self._dataset, index, self._find)
        if self._accelerator.is_main_process:
            save_tensors(path, {"made_for": key, "shares": shares})
        return shares


def _key(head: DraftHead, used: Tensor) -> str:
    """What a shard's shares depend on, beside its content: the vocabulary and the samples."""
    parts = (head.d2t.cpu().numpy().tobytes(), used.numpy().tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()


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
    """What is cached; None if it is missing, damaged, or of another vocabulary or other samples."""
    try:
        cached = load_tensors(path, label="cached shares", remedy="", mmap=False)
    except UserError:
        return None
    if not isinstance(cached, dict) or cached.get("made_for") != key:
        return None
    shares = cached.get("shares")
    is_whole = is_dense(shares, torch.float16) and shares.shape == shard.input_ids.shape
    return shares if is_whole else None


def _scored(dataset: Dataset, index: int) -> Tensor:
    """[T] bool: a shard's answer tokens in samples that are used; no others are ever scored."""
    return dataset.shards[index].loss_mask.bool() & dataset.used(index)


def _shares(
    dataset: Dataset,
    index: int,
    find: SharesInVocab,
    tell: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """[T] float16; only scored tokens take the product.

    Args:
        tell: called with the number of tokens that were done.
    """
    shard = dataset.shards[index]
    shares = torch.zeros(len(shard.loss_mask), dtype=torch.float16)
    finals = shard.final()
    for rows in _scored(dataset, index).nonzero().flatten().split(CHUNK_ROWS):
        shares[rows] = find(finals[rows]).half().cpu()
        tell(len(rows))
    return shares
