# SPDX-License-Identifier: Apache-2.0
"""Which optimizer moves which weight, and at which rate."""

import torch
from torch import nn

from stages.train.loop.optimizer import make_optimizer


def test_muon_moves_the_matrices_alone_and_adamw_the_rest_at_its_own_rate() -> None:
    module = nn.ModuleDict(
        {"fc": nn.Linear(4, 4, bias=False), "lm_head": nn.Linear(4, 8, bias=False)}
    )
    module["norm"] = nn.RMSNorm(4)
    optimizer = make_optimizer(module, learning_rate=4e-3, muon=torch.float32, adamw_rate=2e-3)
    groups = {group["muon"]: group for group in optimizer.param_groups}
    assert [p is module["fc"].weight for p in groups[True]["params"]] == [True]
    assert {id(p) for p in groups[False]["params"]} == {
        id(module["lm_head"].weight),
        id(module["norm"].weight),
    }
    assert (groups[True]["lr"], groups[False]["lr"]) == (4e-3, 2e-3)
