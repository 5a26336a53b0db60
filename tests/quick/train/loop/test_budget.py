# SPDX-License-Identifier: Apache-2.0
"""Batch size and learning rate by the tokens at hand, warm-up, and the plateau."""

import logging
from typing import Any

import pytest

from shared.settings import build
from stages.train.config import TrainConfig
from stages.train.loop import budget

DUMP = {"counts": {"ok": 1000}, "facts": {"tokens": 200_000}}


def config(**flags: str) -> TrainConfig:
    return build(TrainConfig, {"target": "t", **flags})


def test_auto_becomes_numbers_which_are_part_of_the_identity() -> None:
    """950 samples train: 190,000 tokens, four epochs."""
    found = budget.resolved(config(epochs="4"), DUMP, 4096)
    assert (found.batch_tokens, found.learning_rate) == (1024, 1.6e-3)
    identity = found.identity()
    assert identity["train.batch_tokens"] == 1024
    assert identity["train.learning_rate"] == 1.6e-3
    assert budget.resolved(config(optimizer="adamw"), DUMP, 4096).learning_rate == 2.8e-4


def test_what_is_set_stays() -> None:
    found = budget.resolved(config(batch_tokens="4096", learning_rate="3e-4"), DUMP, 4096)
    assert (found.batch_tokens, found.learning_rate) == (4096, 3e-4)


@pytest.mark.parametrize(
    ("flags", "dump", "expected"),
    [
        ({"max_samples": "475", "epochs": "8"}, DUMP, 1024),  # as many tokens, all epochs together
        ({"max_samples": "95", "epochs": "1"}, DUMP, 512),  # the smallest
        ({}, {"counts": {"ok": 500_000}, "facts": {"tokens": 10**9}}, 16_384),  # the largest
        ({}, {"counts": {"ok": 7}, "facts": {}}, 512),
    ],
)
def test_the_batch_follows_the_tokens_that_are_trained_on(
    flags: dict[str, str], dump: dict[str, Any], expected: int
) -> None:
    assert budget.resolved(config(**flags), dump, 64).batch_tokens == expected


@pytest.mark.parametrize(
    ("optimizer", "highest"), [("adamw", budget.ADAMW_MAX_RATE), ("muon", budget.MUON_MAX_RATE)]
)
def test_a_warm_start_takes_a_lower_rate_and_a_narrow_head_a_bounded_one(
    optimizer: str, highest: float
) -> None:
    new, warm = (budget.rate(4096, optimizer, is_warm=is_warm) for is_warm in (False, True))
    assert warm == pytest.approx(new / 4, 0.05)
    assert budget.rate(64, optimizer, is_warm=False) == highest


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, 2.8e-4),
        ({"learning_rate": "1e-4"}, 1e-4),
        ({"init_from": "head"}, 7e-5),
        ({"optimizer": "adamw"}, 2.8e-4),
    ],
)
def test_beside_muon_adamw_takes_its_own_rate_at_most(
    flags: dict[str, str], expected: float
) -> None:
    assert budget.adamw_rate(budget.resolved(config(**flags), DUMP, 4096), 4096) == expected


@pytest.mark.parametrize(("steps", "expected"), [(1000, 20), (100_000, 1000), (30, 1), (1, 0)])
def test_warm_up_is_a_number_of_steps(steps: int, expected: int) -> None:
    assert budget.warmup_steps(config(), steps) == expected


def test_warm_up_as_set_leaves_a_step_to_train() -> None:
    assert budget.warmup_steps(config(warmup_steps="500"), 1000) == 500
    assert budget.warmup_steps(config(warmup_steps="500"), 300) == 299


@pytest.mark.parametrize(
    ("flags", "step", "best", "total", "expected"),
    [
        ({}, 3000, 2000, 4000, True),
        ({}, 2900, 2000, 4000, False),
        ({}, 3001, 2000, 4000, False),  # no walk there
        ({}, 400, 0, 1000, False),  # fewer than five walks
        ({}, 500, 0, 1000, True),
        ({"plateau_fraction": "null"}, 4000, 0, 4000, False),
    ],
)
def test_a_plateau_is_a_share_of_the_steps_and_five_walks(
    flags: dict[str, str], step: int, best: int, total: int, expected: bool
) -> None:
    assert budget.is_on_plateau(config(**flags), step, best, total) is expected


def test_few_steps_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    found = budget.resolved(config(batch_tokens="16384"), DUMP, 4096)
    with caplog.at_level(logging.INFO):
        budget.tell(found, 24, 0)
    told, warned = caplog.messages
    assert told.startswith("24 steps of 16384 tokens, learning rate 0.0016 after 0 warm-up steps")
    assert "only 24 steps: expect a low acceptance length" in warned
    caplog.clear()
    with caplog.at_level(logging.INFO):
        budget.tell(found, 100, 2)
    assert len(caplog.messages) == 1


def test_the_limit_that_made_the_steps_few_is_named(caplog: pytest.LogCaptureFixture) -> None:
    limited = budget.resolved(config(batch_tokens="1024", max_steps="24"), DUMP, 4096)
    budget.tell(limited, 24, 0)
    budget.tell(limited, 20, 0)  # the epochs end before
    by_limit, by_epochs = caplog.messages
    assert "Raise train.max_steps" in by_limit and "batch_tokens" not in by_limit
    assert "train.max_steps" not in by_epochs
    assert by_epochs.endswith("raise train.epochs, or lower train.batch_tokens")


def test_a_training_that_follows_no_dump_is_what_it_is_without_the_key() -> None:
    plain = config()
    assert "train.follow" not in plain.identity() and config(follow="false") == plain
    following = config(follow="true")
    assert following.identity() == plain.identity() | {"train.follow": True, "train.epochs": 1}
    assert config(follow="true", epochs="3").epochs == 3
