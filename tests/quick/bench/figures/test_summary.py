# SPDX-License-Identifier: Apache-2.0
"""Statistics over prompts, on samples small enough to enumerate."""

import itertools
import statistics

import pytest

from stages.bench.figures import summary
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
    interval = summary.acceptance_length_interval(rows, seed=0)
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
        low, high = summary.acceptance_length_interval(rows, seed=0) or (0, 0)
        covered += low <= truth <= high
    # The percentile bootstrap of 30 is a little narrow; four binomial errors of 0.94 besides.
    assert 0.88 < covered / 200 < 0.99


def test_turns_of_one_conversation_are_drawn_together() -> None:
    rows = [request("a", "x", [1, 1], tokens=3, latency_s=1.0, turn=turn) for turn in range(8)]
    assert summary.acceptance_length_interval(rows, seed=0) is None  # one conversation says nothing
    split = [
        request("a", "x", [1, 0], tokens=1, latency_s=1.0),
        request("a", "x", [0, 1], tokens=2, latency_s=1.0, turn=1),
        request("b", "x", [0, 0, 3], tokens=9, latency_s=1.0),
    ]  # the docstring's two conversations, the first in two turns
    assert summary.acceptance_length_interval(split, seed=0) == pytest.approx([1.5, 3.0])


def test_no_interval_without_counts_by_request() -> None:
    assert summary.acceptance_length_interval(baseline_requests(), seed=0) is None


def test_latencies() -> None:
    # 30 tokens, the first after 0.1 s, the last after 1 s or 2 s: 0.9 / 29 and 1.9 / 29 a token.
    found = summary.latencies(head_requests())
    assert found["ttft_s"] == pytest.approx({"median": 0.1, "p99": 0.1})
    each = [0.9 / 29, 0.9 / 29, 1.9 / 29, 1.9 / 29]
    assert found["tpot_s"]["median"] == pytest.approx(statistics.median(each))
    cuts = statistics.quantiles(each, n=100, method="inclusive")
    assert found["tpot_s"]["p99"] == pytest.approx(cuts[98])


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    found = summary.latencies([request("a", "x", [1, 0], tokens=1, latency_s=0.1)])
    assert found["tpot_s"] is None
    assert summary.quantiles([]) is None


def test_a_constant_ratio_has_a_point_as_its_interval() -> None:
    """Every answer took half the time: whatever is drawn, the speed-up is the same."""
    interval = summary.speedup_interval(head_requests(), baseline_requests(), speedup=1.9, seed=0)
    assert interval == pytest.approx([1.9, 1.9])


def test_a_speedup_of_one_category_alone_widens_the_interval() -> None:
    plain = [
        {**row, "latency_s": row["latency_s"] * (3 if row["category"] == "coding" else 1)}
        for row in baseline_requests(1.0)
    ]
    low, high = summary.speedup_interval(head_requests(), plain, speedup=2.0, seed=0) or (0, 0)
    assert low < 1.5 < 2.5 < high
