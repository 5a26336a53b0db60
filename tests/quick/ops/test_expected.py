# SPDX-License-Identifier: Apache-2.0
"""The acceptance length to expect, by what others have published."""

import pytest

from stages.bench.config import BenchConfig
from stages.ops.expected import expectation, gate, published


@pytest.mark.parametrize(
    ("rows", "hidden_size", "expected"),
    [
        (
            50_000,
            4096,
            ["AL 1.94 from 50,000 rows x 5 epochs (Qwen2.5-7B on GSM8K, ", "AL 2.82 from 508,000"],
        ),
        (
            2_000,
            2048,
            ["AL 1.89 from 5,000 rows x 5 epochs at K = 3 (Qwen3-8B on "],
        ),  # the best of 5,000
        (
            10**6,
            4096,
            ["AL 2.82 from 508,000 rows x 2 epochs at K = 5 (Qwen3-8B on nine "],
        ),
        (900, 4096, []),  # too few to compare
        (5_000, 192, []),  # too small a target
        (
            480,
            576,
            [
                "AL 1.95 from 250 rows x 5 epochs at K = 3 (SmolLM2-135M on test questions of GSM8K, "
                "measured by Eyrie",
                "AL 2.28 from 500 rows",
            ],
        ),
        (None, 4096, []),
    ],
)
def test_the_expected_length_quotes_the_figures_next_to_the_rows(
    rows: int | None, hidden_size: int, expected: list[str]
) -> None:
    line = expectation(rows, 2, hidden_size)
    assert line.count("AL ") == len(expected) and bool(line) == bool(expected)
    for part in expected:
        assert part in line


@pytest.mark.parametrize(
    ("rows", "hidden_size", "expected"),
    [
        (50_000, 4096, 1.7),  # 0.9 x 1.94
        (400_000, 4096, 1.7),
        (20_000, 2048, 1.3),  # 0.9 x 1.45, the lowest of 5,000
        (2_000, 2048, 1.3),  # fewer than any figure's
        # 0.9 x 2.817 is above bench's own.
        (600_000, 4096, BenchConfig.model_fields["min_acceptance_length"].default),
        (900, 4096, 0),  # too few to compare
        (5_000, 192, 0),  # too small a target
        (480, 576, 1.1),  # 0.9 x 1.26, on prompts unlike the training's
        (5_000, 576, 1.6),
    ],
)
def test_bench_requires_less_than_others_reached(
    rows: int, hidden_size: int, expected: float
) -> None:
    assert gate(rows, hidden_size) == expected


@pytest.mark.parametrize("hidden_size", [576, 4096])
def test_more_rows_never_have_a_lower_gate(hidden_size: int) -> None:
    gates = [gate(rows, hidden_size) for rows in (2, 900, 1_000, 5_000, 50_000, 600_000)]
    assert gates == sorted(gates)


def test_published_figures_name_their_source() -> None:
    for row in published():
        assert row["source"]
        assert 1 <= row["acceptance_length"] <= row.get("k", 7) + 1
