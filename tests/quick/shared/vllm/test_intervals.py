# SPDX-License-Identifier: Apache-2.0
"""95 % intervals over prompts, on samples small enough to enumerate."""

import itertools
import random
from typing import Any

import pytest

from shared.vllm import intervals
from tests.measurements import baseline_requests, head_requests, request


def test_the_docstring_example_of_the_bootstrap() -> None:
    """Two conversations: the four equally likely draws, enumerated, are what the interval spans."""
    rows = [
        request("a", "x", [1, 1], tokens=3, latency_s=1.0),  # 1 accepted in 2 drafts
        request("b", "x", [0, 0, 3], tokens=9, latency_s=1.0),  # 6 accepted in 3 drafts
    ]
    known = {"a": (1, 2), "b": (6, 3)}
    lengths = sorted(
        1 + sum(known[n][0] for n in draw) / sum(known[n][1] for n in draw)
        for draw in itertools.product("ab", repeat=2)
    )
    assert lengths == pytest.approx([1.5, 2.4, 2.4, 3.0])
    # 2.5 % lies within the lowest quarter of the draws, 97.5 % within the highest.
    interval = intervals.acceptance_length_interval(rows, seed=0)
    assert interval == pytest.approx([lengths[0], lengths[-1]])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """200 samples of 30 conversations from a known law: 95 % intervals cover it, give or take."""
    import numpy as np

    rng = np.random.default_rng(1)
    drafts, rates = 20, rng.beta(4, 2, size=200_000)
    truth = 1 + rates.mean()
    covered = 0
    for _ in range(200):
        hits = rng.binomial(drafts, rng.choice(rates, 30))
        rows = [
            request(str(n), "x", [int(drafts - hit), int(hit)], tokens=2, latency_s=1.0)
            for n, hit in enumerate(hits)
        ]
        low, high = intervals.acceptance_length_interval(rows, seed=0) or (0, 0)
        covered += low <= truth <= high
    # The percentile bootstrap of 30 is a little narrow; four binomial errors of 0.94 besides.
    assert 0.88 < covered / 200 < 0.99


def test_turns_of_one_conversation_are_drawn_together() -> None:
    rows = [request("a", "x", [1, 1], tokens=3, latency_s=1.0, turn=turn) for turn in range(8)]
    assert (
        intervals.acceptance_length_interval(rows, seed=0) is None
    )  # one conversation says nothing
    split = [
        request("a", "x", [1, 0], tokens=1, latency_s=1.0),
        request("a", "x", [0, 1], tokens=2, latency_s=1.0, turn=1),
        request("b", "x", [0, 0, 3], tokens=9, latency_s=1.0),
    ]  # the docstring's two conversations, the first in two turns
    assert intervals.acceptance_length_interval(split, seed=0) == pytest.approx([1.5, 3.0])


def test_no_interval_without_counts_by_request() -> None:
    assert intervals.acceptance_length_interval(baseline_requests(), seed=0) is None


def test_what_is_hard_for_both_heads_is_no_part_of_a_gain() -> None:
    """Of chats that differ a lot each side's own interval is wide, and the gain's is not."""

    def answers(*accepted: int) -> list[dict[str, Any]]:
        return [
            request(str(n), "x", [10 * drafts - hits, hits], tokens=2, latency_s=1.0)
            for n, (hits, drafts) in enumerate(zip(accepted, (1, 4), strict=True))
        ]

    before, after = answers(0, 40), answers(1, 40)  # 1.0 and 2.0, then 1.1 and 2.0
    own = intervals.acceptance_length_interval(before, seed=0)
    assert own == pytest.approx([1.0, 2.0])
    assert intervals.gain_interval(after, before, seed=0) == pytest.approx([0.0, 0.1])
    assert intervals.gain_interval(before, before, seed=0) == [0.0, 0.0]


def test_a_head_that_is_no_better_seldom_has_a_gain_and_a_better_one_mostly() -> None:
    """100 sets of 32 chats, each up to a tenth better or worse at random: no gain, and one of a tenth."""
    draw = random.Random(0)

    def answers(lengths: list[float]) -> list[dict[str, Any]]:
        hits = [round(100 * (length - 1)) for length in lengths]
        return [
            request(str(n), "x", [100 - hit // 3, 0, 0, hit // 3], tokens=2, latency_s=1.0)
            for n, hit in enumerate(hits)
        ]

    def above_zero(gain: float) -> int:
        count = 0
        for _ in range(100):
            before = [draw.uniform(1.3, 3.0) for _ in range(32)]
            after = [(1 + gain) * length * draw.uniform(0.9, 1.1) for length in before]
            low, _ = intervals.gain_interval(answers(after), answers(before), seed=0) or (0, 0)
            count += low > 0
        return count

    assert above_zero(0.0) <= 10  # the points alone are above 0 in half of them
    assert above_zero(0.1) >= 95


def test_a_gain_is_of_the_prompts_that_both_answered_and_counted() -> None:
    both, blind = head_requests(), baseline_requests()
    other = [{**row, "id": "another-" + row["id"]} for row in both]
    assert intervals.gain_interval(both, both[:1] + other, seed=0) is None
    assert intervals.gain_interval(both, blind, seed=0) is None
    assert intervals.gain_interval(blind, both, seed=0) is None


def test_a_constant_ratio_has_a_point_as_its_interval() -> None:
    """Every answer took half the time: whatever is drawn, the speed-up is the same."""
    interval = intervals.speedup_interval(head_requests(), baseline_requests(), speedup=1.9, seed=0)
    assert interval == pytest.approx([1.9, 1.9])


def test_a_speedup_of_one_category_alone_widens_the_interval() -> None:
    plain = [
        {**row, "latency_s": row["latency_s"] * (3 if row["category"] == "coding" else 1)}
        for row in baseline_requests(1.0)
    ]
    low, high = intervals.speedup_interval(head_requests(), plain, speedup=2.0, seed=0) or (0, 0)
    assert low < 1.5 < 2.5 < high
