# SPDX-License-Identifier: Apache-2.0
"""The forecast of a learning curve."""

import pytest

from shared.config import build
from shared.errors import UserError
from stages.train.config import CurveConfig
from stages.train.curve import WALK_NOISE, forecast, sample_counts

# Measured on the demo, K = 3: classic EAGLE-3 in 255 steps, EAGLE-3.1 in 173 to 198.
CURVES = (
    {75: 2.75, 150: 3.15, 300: 3.34, 1140: 3.39},
    {59: 2.816, 119: 3.133, 238: 3.414, 950: 3.521},
)


@pytest.mark.parametrize("curve", CURVES)
def test_a_quarter_of_the_demo_forecasts_all_of_it(curve: dict[int, float]) -> None:
    *shares, whole = curve
    found, low, high = forecast({n: curve[n] for n in shares}, whole, 4)
    assert found == pytest.approx(curve[whole], abs=0.15)
    assert low <= found <= high


def test_the_worked_example() -> None:
    assert forecast({75: 2.75, 150: 3.15, 300: 3.34}, 1140, 4)[0] == pytest.approx(3.50, abs=0.005)


@pytest.mark.parametrize("exponent", [0.3, 0.7, 1.1])
def test_a_power_law_lies_within_the_range(exponent: float) -> None:
    def law(n: int) -> float:
        return float(3.2 - 1.5 * (n / 100) ** -exponent)

    found, low, high = forecast({n: law(n) for n in (100, 200, 400, 800)}, 8000, 4)
    assert found == pytest.approx(law(8000), abs=0.15)
    assert low <= law(8000) <= high


def test_no_forecast_leaves_what_there_can_be() -> None:
    straight = {100: 1.2, 200: 2.2, 400: 3.2}  # a doubling adds 1: no end in sight
    assert forecast(straight, 10**9, 4)[0] <= 4
    falling = {100: 2.5, 200: 2.4, 400: 2.2}  # noise: more data never takes from the best fit
    assert forecast(falling, 800, 4)[0] == pytest.approx(2.37, abs=0.01)


def test_few_points_leave_a_wide_range() -> None:
    steep = forecast({100: 1.5, 200: 2.0, 400: 2.4}, 4000, 4)
    flat = forecast({100: 3.0, 200: 3.02, 400: 3.03}, 4000, 4)
    assert steep[2] - steep[1] > flat[2] - flat[1]


@pytest.mark.parametrize(
    "lengths",
    [
        {100: 3.0, 200: 3.0, 400: 3.0},
        {100: 3.0, 200: 2.5, 400: 2.0},
        {100: 1.0, 200: 1.0, 400: 1.0},
    ],
    ids=["flat", "falling", "none accepted"],
)
def test_a_range_is_as_wide_as_the_walks_are_uncertain(lengths: dict[int, float]) -> None:
    found, low, high = forecast(lengths, 4000, 4)
    walks = list(lengths.values())
    scatter = max(WALK_NOISE, (sum((walk - found) ** 2 for walk in walks) / len(walks)) ** 0.5)
    assert low <= max(1.0, found - 0.99 * scatter)
    assert high >= found + 0.99 * scatter
    assert 1 <= low <= found <= high <= 4


@pytest.mark.parametrize(
    ("shares", "rows", "found"),
    [("1,1,1", 380, r"\[380\]"), ("0.1,0.2,0.3,0.4", 4, r"\[1, 2\]"), ("0.5,0.5,1", 10, "5, 10")],
)
def test_a_forecast_needs_three_sizes(shares: str, rows: int, found: str) -> None:
    config = build(CurveConfig, {"target": "t", "shares": shares})
    with pytest.raises(UserError, match=rf"three different numbers .* found .*{found}") as refused:
        sample_counts(config.shares, rows)
    assert refused.value.code == "curve-shares"
    assert sample_counts((0.25, 0.5, 1.0), 8) == [2, 4, 8]


def test_a_curve_reads_a_whole_dump_several_times() -> None:
    with pytest.raises(UserError, match="follow"):
        build(CurveConfig, {"target": "t", "follow": "true"})
