# SPDX-License-Identifier: Apache-2.0
"""The forecast of a learning curve."""

import pytest

from stages.train.curve import forecast

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
