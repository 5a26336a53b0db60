# SPDX-License-Identifier: Apache-2.0
"""One bit a token: is the target's argmax there in the draft vocabulary? Made once, then kept.

It takes a product with the target's whole lm_head, which would be the largest of a training step;
so it is made shard by shard, shared out over the ranks, and cached in the artifact's folder.
"""

import hashlib
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


def in_vocab_flags(
    dataset: Dataset,
    head: DraftHead,
    tensors: TargetTensors,
    folder: Path,
    accelerator: Accelerator,
) -> list[Tensor]:
    """For each shard [T] bool. Every rank calls it."""
    own = range(accelerator.process_index, len(dataset.shards), accelerator.num_processes)
    if head.config.draft_vocab_size == head.config.vocab_size:
        for index in own:
            dataset.require_unchanged(index)
        return [torch.ones(len(shard.input_ids), dtype=torch.bool) for shard in dataset.shards]
    key = hashlib.sha256(head.d2t.cpu().numpy().tobytes()).hexdigest()
    for index in own:
        path = _path(folder, index)
        if _read(path, key, dataset.shards[index]) is None:
            dataset.require_unchanged(index)  # a pass over it anyway, and the first
            flags = _flags(dataset.shards[index], head, tensors, accelerator.device)
            save_tensors(path, {"vocabulary": key, "flags": flags})
    accelerator.wait_for_everyone()
    return [_require(_path(folder, i), key, shard) for i, shard in enumerate(dataset.shards)]


def _require(path: Path, key: str, shard: Shard | RowFile) -> Tensor:
    flags = _read(path, key, shard)
    if flags is None:
        raise RetryableError(
            f"{path}: expected the flags that another rank has just written, found none that fit. "
            "All nodes must see one workspace; run the same command again."
        )
    return flags


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.pt"


def _read(path: Path, key: str, shard: Shard | RowFile) -> Tensor | None:
    """The cached flags, or None where they are missing, damaged, or of another vocabulary."""
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
    shard: Shard | RowFile, head: DraftHead, tensors: TargetTensors, device: torch.device
) -> Tensor:
    best = target_argmax(
        shard.final().to(device),
        norm=tensors.norm.to(device),
        lm_head=tensors.lm_head.to(device),
    )
    flags: Tensor = head.t2d[best].cpu()
    return flags
