# SPDX-License-Identifier: Apache-2.0
"""AdamW over the trained weights, and the schedule of the learning rate."""

import math

import torch
from torch import nn


def make_optimizer(
    module: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW; `fused` makes one pass over memory, the plain version about seven."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trained, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=fused
    )


def lr_factor(schedule: str, step: int, *, total: int, warmup: int, minimum: float) -> float:
    """Linear warm-up to 1 over `warmup` steps, then decay to `minimum` at `total`.

    Worked example, linear, total 10, warmup 2, minimum 0: steps 0, 1, 2, 6 give 0.5, 1, 1, 0.5.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(1, total - warmup), 1.0)
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return minimum + (1 - minimum) * left
