# SPDX-License-Identifier: Apache-2.0
"""Muon for a processor: torch's own, but all matrices of one shape at once, and in a chosen type.

torch.optim.Muon orthogonalises one matrix after another, always in bfloat16. A processor without
bfloat16 arithmetic takes longer over that than over the model's forward and backward together, and
the demo would take minutes longer.

Momentum, Nesterov's look-ahead and the quintic Newton-Schulz iteration as in Jordan et al., "Muon: An
optimizer for hidden layers in neural networks" (2024); the step's size as AdamW's (Moonshot's
"Muon is scalable for LLM training", 2025): 0.2 sqrt(max(rows, columns)).
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_NUM_ITERATIONS = 5
_EPSILON = 1e-7


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest half-orthogonal matrix of each, [N, R, C] -> [N, R, C], roughly.

    The iteration brings the singular values to about 0.7 to 1.2, which is all that Muon needs.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.flatten(1).norm(dim=1).clamp(min=_EPSILON)[:, None, None]
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For the matrices of a model's layers, not for its embedding or its norms."""

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients that are there."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                ahead = [self._look_ahead(each, group["momentum"]) for each in parameters]
                updates = orthogonalise(torch.stack(ahead), self._dtype)
                size = group["lr"] * 0.2 * math.sqrt(max(shape))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.to(parameter.dtype), alpha=-size)

    def _look_ahead(self, parameter: Tensor, momentum: float) -> Tensor:
        grad = parameter.grad
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(grad, 1 - momentum)
        return torch.lerp(grad, state["momentum"], momentum)  # type: ignore[arg-type]
