# SPDX-License-Identifier: Apache-2.0
"""How busy the host is, from /proc/stat."""

import os
from pathlib import Path

import pytest

from stages.bench.measure import machine

STAT = """cpu  100 0 0 100 0 0 0 0 0 0
cpu0 95 0 0 20 0 0 0 0 0 0
cpu1 5 1 2 80 10 0 1 1 0 0
cpu10 9 9 9 9 9 9 9 9 0 0
intr 1 2 3

"""


def test_the_worked_example() -> None:
    assert machine.ticks(STAT, {1}) == (10, 100)
    assert machine.ticks(STAT, {0, 1}) == (105, 215)


def test_it_counts_what_runs_while_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter(((10, 100), (40, 200)))
    monkeypatch.setattr(machine, "_LOOK_S", 0.0)
    monkeypatch.setattr(machine, "ticks", lambda *_: next(looks))
    assert machine.busy_share() == pytest.approx(0.3)


def test_this_machine_has_its_cores_there() -> None:
    busy, whole = machine.ticks(Path("/proc/stat").read_text(), os.sched_getaffinity(0))
    assert 0 < busy <= whole
