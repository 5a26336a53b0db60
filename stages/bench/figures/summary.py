# SPDX-License-Identifier: Apache-2.0
"""Figures of several answers together; their intervals: `shared/vllm/intervals.py`.

In: one row a request (tokens, times). Out: medians, 99th percentiles and rates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Request = Mapping[str, Any]


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median and 99th percentile (numpy's linear interpolation); None of nothing."""
    if not values:
        return None
    median, p99 = np.quantile(np.asarray(values), (0.5, 0.99))
    return {"median": float(median), "p99": float(p99)}


def latencies(requests: Sequence[Request]) -> dict[str, Any]:
    """Time to first token and time per output token after it, in seconds.

    tpot = (last token's time - first token's time) / (tokens - 1)
    """
    return {
        "ttft_s": quantiles([r["ttft_s"] for r in requests]),
        "tpot_s": quantiles(
            [
                (r["latency_s"] - r["ttft_s"]) / (len(r["token_ids"]) - 1)
                for r in requests
                if len(r["token_ids"]) > 1
            ]
        ),
    }


def request_rate(requests: Sequence[Request]) -> float | None:
    """Tokens a second of one request's own time: sum of tokens / sum of latencies."""
    if not requests:
        return None
    spent_s = sum(request["latency_s"] for request in requests)
    return float(sum(len(request["token_ids"]) for request in requests) / max(spent_s, 1e-9))
