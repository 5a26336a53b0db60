# SPDX-License-Identifier: Apache-2.0
"""95 % intervals over prompts: how far a measurement holds beyond its own prompts.

In: answers, one a request, as bench leaves them in `raw/` (id, tokens, times, draft counters). The interval
is Efron's percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13):
whole conversations are drawn anew with replacement, since the turns of one conversation and the tokens of
one answer are not independent. Every figure is a ratio of sums, never a mean of ratios, so that a long
answer counts as much as its tokens. Two measurements of the same prompts are compared in pairs: a draw has
the same conversations of both, so that what is hard for both is no difference.

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
Terms = Callable[[Request], tuple[float, float]]


def _per_conversation(requests: Sequence[Request], terms: Terms) -> dict[str, Any]:
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


def _are_counted(requests: Sequence[Request]) -> bool:
    return all(request["counters"] is not None for request in requests)


def _length(sums: np.ndarray) -> np.ndarray:
    """1 + accepted / drafts, of (accepted, drafts) in the last axis."""
    return 1.0 + sums[..., 0] / np.maximum(sums[..., 1], 1.0)


def _paired(ours: Sequence[Request], theirs: Sequence[Request], terms: Terms) -> np.ndarray | None:
    """[C, 4]: both sides' terms of the conversations that both answered; None of fewer than two."""
    left, right = _per_conversation(ours, terms), _per_conversation(theirs, terms)
    both = [np.concatenate((left[name], right[name])) for name in left if name in right]
    return np.array(both) if len(both) > 1 else None


def acceptance_length_interval(requests: Sequence[Request], *, seed: int) -> Interval:
    """95 % interval of 1 + accepted / drafts; None without per-request counters."""
    if not _are_counted(requests):
        return None
    sums = _per_conversation(requests, _accepted_and_drafts)
    if len(sums) < 2:
        return None
    return _interval(_length(_resample(np.array(list(sums.values())), seed)))


def gain_interval(after: Sequence[Request], before: Sequence[Request], *, seed: int) -> Interval:
    """95 % interval of `after`'s acceptance length / `before`'s - 1, over the prompts that both answered.

    None without per-request counters. Worked example: (accepted, drafts) of 10 and 10, then 12 and 10, in
    each of two conversations: 2.0 and 2.2 in every draw, so the interval is 0.1 to 0.1, however the
    conversations differ.
    """
    if not (_are_counted(after) and _are_counted(before)):
        return None
    paired = _paired(after, before, _accepted_and_drafts)
    if paired is None:
        return None
    draws = _resample(paired, seed)
    return _interval(_length(draws[:, :2]) / _length(draws[:, 2:]) - 1)


def speedup_interval(
    requests: Sequence[Request], baseline: Sequence[Request], *, speedup: float, seed: int
) -> Interval:
    """95 % interval of the speed-up, over the prompts that both engines answered.

    Wall time cannot be drawn anew, request time can; a closed loop keeps its slots busy, so that the
    two are proportional. The draws of the ratio of request rates are scaled to the measured speed-up.
    """
    paired = _paired(requests, baseline, _tokens_and_time)
    if paired is None:
        return None
    draws, all_of_it = _resample(paired, seed), paired.sum(axis=0)

    def ratio(sums: np.ndarray) -> np.ndarray:
        return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])

    return _interval(speedup * ratio(draws) / ratio(all_of_it))
