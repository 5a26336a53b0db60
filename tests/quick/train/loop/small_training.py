# SPDX-License-Identifier: Apache-2.0
"""A small training in this process, on random states.

Shapes: 30 target tokens, 12 draft tokens where not all, hidden size 16, aux layers 2, 4 and 5.
"""

from pathlib import Path

import torch
from accelerate import Accelerator

from shared.contracts import hidden_states
from shared.io import files
from shared.settings import build
from shared.target.tensors import FinalNorm, TargetTensors
from stages.train.config import TrainConfig
from stages.train.data.dataset import Dataset
from stages.train.loop import checkpoint
from stages.train.loop.trainer import Trainer
from stages.train.model import DraftHead
from tests.quick.train.export.small_head import make_head

PROMPT_TOKENS = 3
DRAFT_TOKENS = 3  # walk_tokens, K
DATA_CONFIG = {"hidden_states": {"layer_ids": [2, 4, 5, 8]}, "model": {"hidden_size": 16}}


def random_tensors() -> TargetTensors:
    return TargetTensors(torch.randn(30, 16), FinalNorm(torch.ones(16), 1e-5), torch.randn(30, 16))


def dataset(
    folder: Path,
    *,
    answer_tokens: int = 9,
    holdout: float = 0.0,
    max_samples: int | None = None,
) -> Dataset:
    """Two shards of four samples each, with their checksums."""
    torch.manual_seed(0)
    tokens = PROMPT_TOKENS + answer_tokens
    names = [hidden_states.shard_name(index) for index in range(2)]
    for index, name in enumerate(names):
        hidden_states.write_shard(
            folder / name,
            input_ids=torch.randint(0, 30, (4, tokens)).tolist(),
            loss_masks=[[0] * PROMPT_TOKENS + [1] * answer_tokens] * 4,
            states=list(torch.randn(4, tokens, 4, 16)),
            sample_ids=[f"row-{index}-{row}" for row in range(4)],
        )
    entries = {name: {"sha256": files.sha256(folder / name)} for name in names}
    return Dataset(
        folder,
        DATA_CONFIG,
        names,
        holdout_fraction=holdout,
        max_holdout_samples=2,
        max_samples=max_samples,
        manifest={"stage": "dump", "files": entries},
    )


def trainer(
    workspace: Path,
    mixed_precision: str = "no",
    more: dict[str, str] | None = None,
    head: DraftHead | None = None,
    **sizes: int,
) -> Trainer:
    """Eight tokens a step at least, so a sample a step; every step is walked."""
    settings = {"batch_tokens": "8", "eval_every_steps": "1", "epochs": "1", "ttt_steps": "2"}
    settings |= {"learning_rate": "1e-4", **(more or {})}
    flags = {"workspace": str(workspace), "target": "t", "walk_tokens": str(DRAFT_TOKENS)}
    config = build(TrainConfig, {**flags, **settings})
    dump = workspace / "dump"
    dump.mkdir(parents=True, exist_ok=True)
    return Trainer(
        config,
        random_tensors(),
        head or make_head(),
        dataset(dump, holdout=0.25, **sizes),
        workspace / "train",
        Accelerator(cpu=True, mixed_precision=mixed_precision),
    )


def best_step(training: Trainer) -> int:
    state = checkpoint.load(training.checkpoints.folder / checkpoint.BEST)
    assert state is not None
    return int(state["step"])
