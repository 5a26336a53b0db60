# SPDX-License-Identifier: Apache-2.0
"""Copies of a training's state: as it was, in buffers that the next copy takes again."""

from typing import Any

import torch

from stages.train.loop.staging import Staging


def state(value: float, rows: int = 3) -> dict[str, Any]:
    weights = {"w": torch.full((rows, 2), value, requires_grad=True), "t2d": torch.tensor([True])}
    groups = [{"lr": value, "params": ["w"]}, (torch.tensor(int(value)),)]
    return {"step": int(value), "weights": weights, "optimizer": groups, "sums": None}


def test_a_copy_is_the_state_as_it_was() -> None:
    first = state(1.0)
    staged = Staging().copied(first)
    with torch.no_grad():
        first["weights"]["w"].fill_(9.0)
        first["weights"]["t2d"].fill_(False)
        first["optimizer"][1][0].fill_(9)
    found = staged.wait()
    expected = state(1.0)
    assert found["weights"]["w"].tolist() == expected["weights"]["w"].tolist()
    assert found["weights"]["t2d"].tolist() == [True]
    assert found["optimizer"] == [{"lr": 1.0, "params": ["w"]}, (torch.tensor(1),)]
    assert (found["step"], found["sums"]) == (1, None)
    assert not found["weights"]["w"].requires_grad


def test_the_next_copy_takes_the_same_memory_unless_a_shape_has_changed() -> None:
    staging = Staging()
    places = [staging.copied(state(v)).wait()["weights"]["w"].data_ptr() for v in (1.0, 2.0)]
    assert places[0] == places[1]
    wider = staging.copied(state(3.0, rows=50)).wait()["weights"]["w"]
    assert wider.shape == (50, 2) and wider.eq(3.0).all()
    assert staging.copied(state(4.0)).wait()["weights"]["w"].shape == (3, 2)
