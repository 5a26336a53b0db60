# SPDX-License-Identifier: Apache-2.0
"""The forecast of a learning curve, and how its trainings are set."""

import random
from typing import Any

import pytest

from shared.errors import UserError
from shared.settings import build
from stages.train import curve, run
from stages.train.commands import CurveConfig
from stages.train.curve import require_walks, sample_counts, settings_of
from stages.train.data.dataset import Dataset, Sample, pack, shuffled
from stages.train.forecast import WALK_NOISE, forecast, walk_noise

# Measured on the demo, K = 3: classic EAGLE-3 in 255 steps, EAGLE-3.1 in 173 to 198.
CURVES = (
    {75: 2.75, 150: 3.15, 300: 3.34, 1140: 3.39},
    {59: 2.816, 119: 3.133, 238: 3.414, 950: 3.521},
    {59: 2.84, 119: 3.27, 238: 3.51, 950: 3.70},
)
ROWS = (250, 500, 1000, 2000, 5000)
# MEASUREMENTS.md's columns over these rows of SmolLM2-135M: walked, and in vLLM over 80 prompts each.
COLUMNS = {
    "walked": (1.88, 2.22, 2.50, 2.71, 2.84),
    "GSM8K": (1.95, 2.28, 2.50, 2.70, 2.79),
    "MT-Bench": (1.26, 1.37, 1.52, 1.66, 1.78),
}


@pytest.mark.parametrize("curve", CURVES)
def test_a_quarter_of_the_demo_forecasts_all_of_it(curve: dict[int, float]) -> None:
    *shares, whole = curve
    found, low, high = forecast({n: curve[n] for n in shares}, whole, 4, walk_noise(50))
    assert found == pytest.approx(curve[whole], abs=0.15)
    assert low <= curve[whole] <= high


@pytest.mark.parametrize("known", [3, 4])
@pytest.mark.parametrize("column", COLUMNS)
def test_the_first_rows_of_a_real_target_forecast_the_others(column: str, known: int) -> None:
    lengths = dict(zip(ROWS, COLUMNS[column], strict=True))
    for rows in ROWS[known:]:
        found, low, high = forecast({n: lengths[n] for n in ROWS[:known]}, rows, 4, walk_noise(80))
        assert found == pytest.approx(lengths[rows], abs=0.15)
        assert low <= lengths[rows] <= high


def test_a_curve_that_rises_evenly_goes_on_to_rise() -> None:
    found, _, high = forecast({50: 1.2, 100: 1.3, 200: 1.4, 400: 1.5}, 800, 4)
    assert found > 1.55
    assert high >= 1.6


def test_fewer_answers_make_a_wider_range() -> None:
    lengths = {100: 2.0, 200: 2.3, 400: 2.5}
    wide, narrow = (forecast(lengths, 800, 4, walk_noise(answers)) for answers in (5, 50))
    assert wide[2] - wide[1] > 2 * (narrow[2] - narrow[1])
    assert walk_noise(1000) == WALK_NOISE


def test_the_worked_example() -> None:
    found = forecast({75: 2.75, 150: 3.15, 300: 3.34}, 1140, 4)
    assert found == pytest.approx((3.51, 3.35, 3.67), abs=0.005)


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


class Some(Dataset):
    """Samples of random lengths, without files."""

    def __init__(self, rows: int, *, held_out: int = 1) -> None:
        source = random.Random(0)
        lengths = [source.randrange(40, 400) for _ in range(rows + held_out)]
        samples = [Sample(f"s{i}", i % 3, slice(0, length)) for i, length in enumerate(lengths)]
        self.held_out, self.training = samples[:held_out], samples[held_out:]


def steps_of(rows: int, epochs: int) -> list[int]:
    """Of each epoch, at 512 tokens a step."""
    orders = (shuffled(Some(rows).training, seed=0, epoch=epoch) for epoch in range(epochs))
    return [len(pack(order, 512)) for order in orders]


@pytest.mark.parametrize("epochs", ["1", "2", "5"])
@pytest.mark.parametrize("max_steps", [None, 7])
def test_every_share_makes_as_many_steps(
    monkeypatch: pytest.MonkeyPatch, epochs: str, max_steps: int | None
) -> None:
    """Those of all rows, whatever part of an epoch that is."""
    flags = {"target": "t", "epochs": epochs, "batch_tokens": "512"}
    whole = build(CurveConfig, flags).model_copy(update={"max_steps": max_steps})
    steps = max_steps or sum(steps_of(100, int(epochs)))
    monkeypatch.setattr(run, "open_dataset", lambda config, parent: Some(config.max_samples))
    for samples in (7, 13, 60, 80, 90, 100):
        settings = settings_of(whole, {}, samples, steps)
        made = steps_of(samples, settings.epochs)
        assert sum(made[:-1]) < steps <= sum(made)
        assert (settings.max_steps, settings.plateau_fraction) == (steps, None)
        assert settings.max_samples == samples
    assert max_steps or settings.epochs == int(epochs)


@pytest.mark.parametrize(
    ("greedy", "held_out", "code"),
    [(False, 5, "curve-not-greedy"), (True, 0, "curve-nothing-held-out")],
)
def test_a_dump_that_cannot_be_walked_is_refused_before_a_training(
    monkeypatch: pytest.MonkeyPatch, greedy: bool, held_out: int, code: str
) -> None:
    parent: dict[str, Any] = {"facts": {"greedy": greedy, "tokens": 10}, "counts": {"ok": 100}}
    target = type("Target", (), {"hidden_size": 64})
    monkeypatch.setattr(run, "inputs", lambda config: (parent, target))
    monkeypatch.setattr(
        run, "open_dataset", lambda config, parent: Some(95, held_out=held_out), raising=False
    )
    monkeypatch.setattr(run, "run", lambda config: pytest.fail("a share was trained"))
    with pytest.raises(UserError) as refused:
        curve.run(build(CurveConfig, {"target": "t", "holdout_fraction": "0"}))
    assert refused.value.code == code
    require_walks(build(CurveConfig, {"target": "t"}), {"facts": {"greedy": True}}, Some(9))
