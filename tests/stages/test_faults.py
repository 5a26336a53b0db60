# SPDX-License-Identifier: Apache-2.0
"""Faults on purpose, and that every stage recovers from them: a short campaign, and a long one."""

from pathlib import Path

import pytest

from tests.faults import campaign
from tests.faults.bed import STAGES, Bed
from tests.faults.kinds import KINDS

SEED = 355  # draws every kind and every stage


def recovered(folder: Path, faults: int) -> list[campaign.Outcome]:
    """Play them; every one must have recovered."""
    outcomes = list(campaign.play(Bed(folder / "bed"), seed=SEED, faults=faults))
    assert len(outcomes) == faults
    bad = [outcome.line() for outcome in outcomes if outcome.problems]
    assert not bad, "\n".join(bad)
    return outcomes


def test_every_stage_recovers_from_twenty_faults(tmp_path: Path) -> None:
    outcomes = recovered(tmp_path, 20)
    assert {outcome.stage for outcome in outcomes} == set(STAGES)
    assert {outcome.kind for outcome in outcomes} == set(KINDS)


@pytest.mark.soak
def test_every_stage_recovers_from_two_hundred_faults(tmp_path: Path) -> None:
    outcomes = recovered(tmp_path, 200)
    drawn = {(outcome.kind, outcome.stage) for outcome in outcomes}
    assert len(drawn) == sum(len(stages) for _, stages in KINDS.values())
