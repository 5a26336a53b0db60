# SPDX-License-Identifier: Apache-2.0
"""The bench's figures on counters small enough to work out by hand."""

from dataclasses import replace

import pytest

from shared.errors import OutputError
from stages.bench.figures.metrics import (
    Acceptance,
    Counters,
    acceptance,
    check,
    decode_steps,
    delta,
    first_divergence,
    total,
)

# Ten drafts of K = 3: 2 without a hit, 1 with one, 3 with two, 4 with three.
#   accepted = 0*2 + 1*1 + 2*3 + 3*4 = 19; draft tokens = 3*10 = 30
#   position 0 was accepted in 1+3+4 = 8 drafts, position 1 in 3+4 = 7, position 2 in 4
TEN = Counters(10, 30, 19, (8, 7, 4))


def test_acceptance_worked_by_hand() -> None:
    assert acceptance(TEN, num_speculative_tokens=3, always_drafts=True) == Acceptance(
        acceptance_length=2.9,  # 1 + 19/10
        acceptance_rate=pytest.approx(19 / 30),
        per_position=(0.8, 0.7, 0.4),
        conditional=(0.8, 7 / 8, 4 / 7),
        num_drafts=10,
    )


def test_the_docstring_example_counts_past_max_tokens() -> None:
    # Two drafts with 2 and 3 hits: histogram [0, 0, 1, 1]; the answer keeps 6 of 1+3+4 tokens.
    counters = Counters.from_histogram([0, 0, 1, 1], draft_tokens=6)
    assert counters == Counters(2, 6, 5, (2, 2, 1))
    figures = acceptance(counters, num_speculative_tokens=3, always_drafts=True)
    assert figures.acceptance_length == 3.5


def test_nothing_accepted_leaves_the_later_conditionals_open() -> None:
    figures = acceptance(Counters(4, 8, 0, (0, 0)), num_speculative_tokens=2, always_drafts=True)
    assert figures.acceptance_length == 1.0
    assert figures.conditional == (0.0, None)


def test_from_histogram_is_the_same_ten_drafts() -> None:
    assert Counters.from_histogram([2, 1, 3, 4], draft_tokens=30) == TEN


def test_delta_subtracts_the_warm_up() -> None:
    before = Counters(5, 15, 2, (2, 0, 0))
    after = Counters(15, 45, 21, (10, 7, 4))
    assert delta(before, after) == TEN


@pytest.mark.parametrize(
    "after",
    [
        replace(TEN, num_drafts=9),
        replace(TEN, num_draft_tokens=29),
        replace(TEN, num_accepted_tokens=18),
        replace(TEN, num_accepted_tokens_per_pos=(8, 7, 3)),
    ],
)
def test_a_counter_that_runs_backwards_is_refused(after: Counters) -> None:
    with pytest.raises(OutputError, match="ran backwards"):
        delta(TEN, after)


def test_readings_of_different_draft_lengths_are_refused() -> None:
    with pytest.raises(OutputError, match="3 draft positions before and 2 after"):
        delta(TEN, replace(TEN, num_accepted_tokens_per_pos=(12, 7)))


@pytest.mark.parametrize(
    ("counters", "message"),
    [
        (replace(TEN, num_accepted_tokens=20), "sum to the accepted"),
        (replace(TEN, num_accepted_tokens_per_pos=(7, 8, 4)), "more often than the one before"),
        (replace(TEN, num_accepted_tokens_per_pos=(11, 4, 4)), "more often than drafts"),
        (replace(TEN, num_accepted_tokens_per_pos=(10, 9)), "expected 3 draft positions"),
        (replace(TEN, num_draft_tokens=18), "no more accepted tokens than drafted"),
        (replace(TEN, num_draft_tokens=31), "at most 3 x drafts = 30"),
    ],
)
@pytest.mark.parametrize("always_drafts", [True, False])
def test_contradictions_are_refused(counters: Counters, message: str, always_drafts: bool) -> None:
    with pytest.raises(OutputError, match=message):
        check(counters, num_speculative_tokens=3, always_drafts=always_drafts)


def test_only_a_drafter_that_may_skip_may_draft_less() -> None:
    # 10 drafts of K = 3 with 28 instead of 30 tokens: n-gram found a match near the text's end.
    shorter = replace(TEN, num_draft_tokens=28)
    figures = acceptance(shorter, num_speculative_tokens=3, always_drafts=False)
    assert figures.acceptance_rate == pytest.approx(19 / 28)
    with pytest.raises(OutputError, match="exactly 3 x drafts = 30"):
        acceptance(shorter, num_speculative_tokens=3, always_drafts=True)


def test_no_draft_at_all() -> None:
    nothing = Counters.of((0,) * 6)
    figures = acceptance(nothing, num_speculative_tokens=3, always_drafts=False)
    assert (figures.acceptance_length, figures.acceptance_rate) == (1.0, 0.0)
    with pytest.raises(OutputError, match="none was made"):
        acceptance(nothing, num_speculative_tokens=3, always_drafts=True)


def test_total_adds_position_by_position() -> None:
    parts = [TEN, Counters(1, 3, 1, (1, 0, 0))]
    assert total(parts, num_speculative_tokens=3) == Counters(11, 33, 20, (9, 7, 4))
    assert total([], num_speculative_tokens=2) == Counters(0, 0, 0, (0, 0))


def test_decode_steps() -> None:
    # A draft head: 10 drafts yield 10 + 19 = 29 tokens after the prefill's one, so 30 in all.
    assert decode_steps(TEN, output_tokens=30) == 10
    # Cut at max_tokens = 28: the last draft overshot by two; still 10 steps.
    assert decode_steps(TEN, output_tokens=28) == 10
    # N-gram: 2 drafts with 3 hits yield 5 tokens, the other 14 of 20 - 1 took a step each.
    assert decode_steps(Counters(2, 6, 3, (2, 1, 0)), output_tokens=20) == 16


@pytest.mark.parametrize(
    ("left", "right", "index"),
    [
        ([5, 6, 7], [5, 6, 7], None),
        ([5, 6, 7], [5, 9, 7], 1),
        ([5, 6], [5, 6, 7], 2),  # the shorter one ended first
        ([], [], None),
        ([], [5], 0),
    ],
)
def test_first_divergence(left: list[int], right: list[int], index: int | None) -> None:
    assert first_divergence(left, right) == index
    assert first_divergence(right, left) == index
