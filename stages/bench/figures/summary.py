# SPDX-License-Identifier: Apache-2.0
"""Statistics over prompts: how far a measurement holds beyond its own prompts.

In: one row a request (tokens, times, draft counters). Out: medians, 99th percentiles and 95 %
intervals. The interval is Efron's percentile bootstrap (Efron and Tibshirani, An Introduction to
the Bootstrap, 1993, chapter 13): whole conversations are drawn anew with replacement, since the turns of
one conversation and the tokens of one answer are not independent. Every figure is a ratio of sums,
never a mean of ratios, so that a long answer counts as much as its tokens.

Worked example, two conversations with (accepted, drafts) = (1, 2) and (6, 3): acceptance length
1 + 7/5 = 2.4; the draws (a, a), (a, b), (b, a), (b, b) give 1.5, 2.4, 2.4 and 3.0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95

Request = Mapping[str, Any]
Interval = list[float] | None


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


def _per_conversation(
    requests: Sequence[Request], terms: Callable[[Request], tuple[float, float]]
) -> dict[str, Any]:
    """The sums of each conversation's two `terms`, [2], under its id."""
    sums: dict[str, np.ndarray] = {}
    for request in requests:
        sums[request["id"]] = sums.get(request["id"], 0.0) + np.array(terms(request), dtype=float)
    return sums


def _accepted_and_drafts(request: Request) -> tuple[float, float]:
    return request["counters"]["num_accepted_tokens"], request["counters"]["num_drafts"]


def _tokens_and_time(request: Request) -> tuple[float, float]:
    return len(request["token_ids"]), request["latency_s"]


def _resample(sums: np.ndarray, seed: int) -> np.ndarray:
    """Sums over conversations drawn with replacement: [C, n] -> [RESAMPLES, n]."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
    return counts @ sums


def _interval(draws: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    return [float(bound) for bound in np.quantile(draws, (tail, 1 - tail))]


def acceptance_length_interval(requests: Sequence[Request], *, seed: int) -> Interval:
    """95 % interval of 1 + accepted / drafts; None without per-request counters."""
    if any(request["counters"] is None for request in requests):
        return None
    sums = _per_conversation(requests, _accepted_and_drafts)
    if len(sums) < 2:
        return None
    draws = _resample(np.array(list(sums.values())), seed)
    return _interval(1.0 + draws[:, 0] / np.maximum(draws[:, 1], 1.0))


def request_rate(requests: Sequence[Request]) -> float | None:
    """Tokens a second of one request's own time: sum of tokens / sum of latencies."""
    if not requests:
        return None
    spent_s = sum(request["latency_s"] for request in requests)
    return float(sum(len(request["token_ids"]) for request in requests) / max(spent_s, 1e-9))


def speedup_interval(
    requests: Sequence[Request], baseline: Sequence[Request], *, speedup: float, seed: int
) -> Interval:
    """95 % interval of the speed-up, over the prompts that both engines answered.

    Wall time cannot be drawn anew, request time can; a closed loop keeps its slots busy, so that the
    two are proportional. The draws of the ratio of request rates are scaled to the measured speed-up.
    """
    ours = _per_conversation(requests, _tokens_and_time)
    theirs = _per_conversation(baseline, _tokens_and_time)
    names = [name for name in ours if name in theirs]
    if len(names) < 2:
        return None
    paired = np.array([np.concatenate((ours[name], theirs[name])) for name in names])
    draws, all_of_it = _resample(paired, seed), paired.sum(axis=0)

    def ratio(sums: np.ndarray) -> np.ndarray:
        return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])

    return _interval(speedup * ratio(draws) / ratio(all_of_it))
