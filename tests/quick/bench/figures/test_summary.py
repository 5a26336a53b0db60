# SPDX-License-Identifier: Apache-2.0
"""Figures of several answers together, by hand."""

import statistics

import pytest

from stages.bench.figures import summary
from tests.measurements import head_requests, request


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
