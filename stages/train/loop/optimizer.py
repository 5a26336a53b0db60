# SPDX-License-Identifier: Apache-2.0
"""AdamW over the trained weights, or Muon over the layer's matrices; the schedule of the learning rate."""

import math
from typing import Any

import torch
from torch import nn

from shared.muon import MuonAdamW


def make_optimizer(
    module: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
    fused: bool = True,
    muon: torch.dtype | None = None,
    adamw_rate: float | None = None,
) -> torch.optim.AdamW:
    """AdamW over what is trained.

    Args:
        fused: one pass over memory; the plain version makes about seven.
        muon: the dtype of the products by which Muon moves the matrices of fc and of the layer; lm_head,
            whose rows are tokens, and the norms stay AdamW's. None: AdamW for all.
        adamw_rate: of what stays AdamW's beside Muon, which bears higher rates; default: as Muon's.
    """
    trained = [each for each in module.parameters() if each.requires_grad]
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "weight_decay": weight_decay,
        "betas": betas,
        "fused": fused,
    }
    if muon is None:
        return torch.optim.AdamW(trained, **settings)
    matrices = [
        each.weight
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear) and name.rpartition(".")[2] != "lm_head"
    ]
    known = {id(each) for each in matrices}
    others = [each for each in trained if id(each) not in known]
    groups = [
        {"params": matrices, "muon": True},
        {"params": others, "muon": False, "lr": adamw_rate or learning_rate},
    ]
    return MuonAdamW(groups, dtype=muon, **settings)


def lr_factor(schedule: str, step: int, *, total: int, warmup: int, minimum: float) -> float:
    """Linear warm-up to 1 over `warmup` steps, then decay to `minimum` at `total`.

    Worked example, linear, total 10, warmup 2, minimum 0: steps 0, 1, 2, 6 give 0.5, 1, 1, 0.5.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(1, total - warmup), 1.0)
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return minimum + (1 - minimum) * left
