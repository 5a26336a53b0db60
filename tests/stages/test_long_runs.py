# SPDX-License-Identifier: Apache-2.0
"""Memory and open files stay as they are over long runs; and that growth would be seen."""

from pathlib import Path

import pytest

from tests.faults import long_runs


@pytest.mark.soak
@pytest.mark.parametrize("name", long_runs.RUNS)
def test_memory_and_files_are_flat(name: str, tmp_path: Path) -> None:
    found = long_runs.RUNS[name](tmp_path / name)
    assert found.growth <= long_runs.LIMIT, found.line()


def samples(memory: list[float], files: list[float]) -> list[tuple[int, float, float]]:
    """One a step: nothing done at first, all done at last."""
    work = list(zip(range(1, len(memory) + 1), memory, files, strict=True))
    return [(0, 1.0, 1.0), *work, (len(memory) + 1, 9999.0, 99.0)]


def test_growth_of_either_is_seen() -> None:
    flat, growing = [200.0] * 100, [200.0 + step / 10 for step in range(100)]
    assert long_runs.figures("flat", samples(flat, flat), 1.0).growth == 0
    for memory, files in ((growing, flat), (flat, growing)):
        found = long_runs.figures("growing", samples(memory, files), 1.0)
        # Means at the steps 37 and 87: 203.7 and 208.7.
        assert found.growth == pytest.approx(208.7 / 203.7 - 1, abs=1e-4)
        assert found.growth > long_runs.LIMIT
