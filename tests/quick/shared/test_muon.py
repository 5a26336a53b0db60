# SPDX-License-Identifier: Apache-2.0
"""Muon beside AdamW, against torch's own Muon and AdamW."""

import copy

import pytest
import torch
from torch.nn import Parameter

from shared.muon import MuonAdamW


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_each_group_takes_torchs_own_steps(shape: tuple[int, int]) -> None:
    """As close as two bfloat16 products get that add in another order."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    matrix, other, muon, adamw = (Parameter(start.clone()) for _ in range(4))
    ours = MuonAdamW(
        [
            {"params": [matrix], "muon": True, "lr": 0.1, "weight_decay": 0.05},
            {"params": [other], "muon": False, "lr": 0.2},
        ],
        dtype=torch.float32,
        betas=(0.9, 0.95),
    )
    theirs: list[torch.optim.Optimizer] = [
        torch.optim.Muon([muon], lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([adamw], lr=0.2, betas=(0.9, 0.95)),
    ]
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        for each in (matrix, other, muon, adamw):
            each.grad = gradient.clone()
        for optimizer in (ours, *theirs):
            optimizer.step()
    assert (matrix - muon).norm() < 0.02 * (muon - start).norm()
    assert torch.equal(other, adamw)


def test_a_saved_state_goes_on_to_the_same_weights() -> None:
    def made(start: torch.Tensor) -> tuple[Parameter, Parameter, MuonAdamW]:
        matrix, other = Parameter(start.clone()), Parameter(start[0].clone())
        groups = [{"params": [matrix], "muon": True}, {"params": [other], "muon": False}]
        return matrix, other, MuonAdamW(groups, dtype=torch.float32, lr=0.1)

    def step(parts: tuple[Parameter, Parameter, MuonAdamW], grad: torch.Tensor) -> None:
        parts[0].grad, parts[1].grad = grad.clone(), grad[0].clone()
        parts[2].step()

    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(16, 24, generator=generator) for _ in range(4))
    whole = made(start)
    for grad in grads[:2]:
        step(whole, grad)
    again = made(whole[0].detach())
    with torch.no_grad():
        again[1].copy_(whole[1])
    again[2].load_state_dict(copy.deepcopy(whole[2].state_dict()))
    for each in (whole, again):
        step(each, grads[2])
    assert torch.equal(whole[0], again[0])
    assert torch.equal(whole[1], again[1])


def test_matrices_of_one_shape_do_not_mix() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(16, 24, generator=generator) for _ in range(3)]
    grads = [torch.randn(16, 24, generator=generator) for _ in range(3)]

    def moved(indices: list[int]) -> dict[int, torch.Tensor]:
        made = {i: Parameter(starts[i].clone()) for i in indices}
        optimizer = MuonAdamW(
            [{"params": [*made.values()], "muon": True}], dtype=torch.float32, lr=0.1
        )
        for index, parameter in made.items():
            parameter.grad = grads[index].clone()
        optimizer.step()
        return {i: each.detach() for i, each in made.items()}

    together = moved([0, 1, 2])
    for index in range(3):
        torch.testing.assert_close(together[index], moved([index])[index])
