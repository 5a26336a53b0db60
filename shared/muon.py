# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices of a model's layers, AdamW for the rest, in one optimizer.

torch.optim.Muon orthogonalises one matrix after another, always in bfloat16. A processor without
bfloat16 arithmetic takes longer over that than over a small model's forward and backward together;
here all matrices of one shape go at once, in a chosen type. FSDP2's parts are put together for it.

Momentum, Nesterov's look-ahead and the quintic Newton-Schulz iteration as in Jordan et al., "Muon: An
optimizer for hidden layers in neural networks" (2024); the step's size as AdamW's (Moonshot's
"Muon is scalable for LLM training", 2025): 0.2 sqrt(max(rows, columns)).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_NUM_ITERATIONS = 5
_EPSILON = 1e-7
_MOMENTUM = 0.95


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


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for the groups of parameters with `muon: True`, whose [R, C] matrices Muon moves."""

    def __init__(
        self, groups: Sequence[dict[str, Any]], *, dtype: torch.dtype, **settings: Any
    ) -> None:
        """
        Args:
            groups: as any optimizer's, each with `muon`.
            dtype: of Muon's products.
            settings: AdamW's, where a group does not set them; Muon takes lr and weight_decay.
        """
        super().__init__(groups, **settings)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients that are there."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for shape, parameters in by_shape.items():
            ahead = [_whole(self._look_ahead(each)) for each in parameters]
            updates = orthogonalise(torch.stack(ahead), self._dtype)
            size = group["lr"] * 0.2 * math.sqrt(max(shape))
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(_part(update.to(parameter.dtype), parameter), alpha=-size)

    def _look_ahead(self, parameter: Tensor) -> Tensor:
        grad = parameter.grad
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
            state["step"] = torch.tensor(
                0.0
            )  # torch's AdamW wants one in every state that it loads
        state["momentum"].lerp_(grad, 1 - _MOMENTUM)
        return torch.lerp(grad, state["momentum"], _MOMENTUM)  # type: ignore[arg-type]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part(update: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of an update of which every rank has the whole."""
    if not isinstance(parameter, DTensor):
        return update
    return distribute_tensor(update, parameter.device_mesh, parameter.placements)
