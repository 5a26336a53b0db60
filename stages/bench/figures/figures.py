# SPDX-License-Identifier: Apache-2.0
"""The figures of one engine under one load, overall, by category and by the length of the prompt.

In: one load of a raw measurement. Out: JSON values for the report. Formulas: acceptance as in
`metrics`, statistics as in `summary` and `intervals`, and

    tokens/s        = answer tokens / wall seconds (engine start and warm-up left out)
    speed-up        = tokens/s with the drafter / without, at the same load
    of a category   = the same of its requests' own time, at concurrency 1 alone: in a larger batch
                      that time depends on the other categories in it
    tokens per step = decoded tokens / target steps, steps without a draft included: the figure in
                      which a head and the ngram proposer compare
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from shared.errors import OutputError
from shared.vllm import intervals
from stages.bench.figures import summary
from stages.bench.figures.metrics import Counters, acceptance, decode_steps, delta, total

Entry = dict[str, Any]
Requests = Sequence[Mapping[str, Any]]

# Where one group of prompt lengths ends and the next begins, in tokens.
CONTEXT_EDGES = (256, 1024, 4096, 16384, 65536)
CONTEXT_NAMES = (
    f"below {CONTEXT_EDGES[0]}",
    *(f"{low:,} to {high - 1:,}" for low, high in itertools.pairwise(CONTEXT_EDGES)),
    f"{CONTEXT_EDGES[-1]:,} and more",
)


def requests_of(measured: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every answer under a load."""
    return [row for segment in measured["segments"] for row in segment["requests"]]


def throughput(measured: Mapping[str, Any]) -> Entry:
    """Tokens, wall time and latencies; what a baseline has."""
    requests = requests_of(measured)
    tokens = sum(len(request["token_ids"]) for request in requests)
    wall_s = sum(segment["wall_s"] for segment in measured["segments"])
    queue_s = sum(segment["queue_s"] for segment in measured["segments"])
    spent_s = sum(request["latency_s"] for request in requests)
    return {
        "requests": len(requests),
        "cut": sum(request["finish_reason"] == "length" for request in requests),
        "output_tokens": tokens,
        "wall_s": wall_s,
        "tokens_per_s": tokens / wall_s,
        "queued_share": min(queue_s / spent_s, 1.0) if spent_s else 0.0,
        **summary.latencies(requests),
        "categories": {
            name: {
                "requests": len(rows),
                "output_tokens": sum(len(row["token_ids"]) for row in rows),
                "request_tokens_per_s": summary.request_rate(rows),
                **summary.latencies(rows),
            }
            for name, rows in _by_category(requests).items()
        },
    }


def _by_category(requests: Requests) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for request in requests:
        groups.setdefault(request["category"], []).append(request)
    return groups


def _by_context(requests: Requests) -> dict[str, list[Mapping[str, Any]]]:
    """The requests by the length of their prompts, from the shortest.

    Worked example: prompts of 100, 255, 256 and 5,000 tokens are in `below 256` (two), `256 to 1,023` and
    `4,096 to 16,383`.
    """
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for request in sorted(requests, key=lambda row: len(row["prompt_token_ids"])):
        group = bisect.bisect_right(CONTEXT_EDGES, len(request["prompt_token_ids"]))
        groups.setdefault(group, []).append(request)
    return {CONTEXT_NAMES[group]: rows for group, rows in groups.items()}


def drafted(measured: Mapping[str, Any], *, depth: int, always_drafts: bool, seed: int) -> Entry:
    """The same and the acceptance, from the counters' differences.

    Raises:
        OutputError: vLLM's counters contradict each other, or the requests' do not add up to them.
    """
    found = throughput(measured)
    requests = requests_of(measured)
    parts = {
        segment["category"]: delta(
            Counters(**segment["counters_before"]), Counters(**segment["counters_after"])
        )
        for segment in measured["segments"]
    }
    counted = total(parts.values(), num_speculative_tokens=depth)
    per_category = _category_counters(requests, parts, counted, depth)

    def figures(counters: Counters, rows: Requests) -> Entry:
        known = acceptance(counters, num_speculative_tokens=depth, always_drafts=always_drafts)
        interval = intervals.acceptance_length_interval(rows, seed=seed)
        return {**asdict(known), "acceptance_length_interval": interval}

    found["acceptance"] = figures(counted, requests)
    found["counters"] = asdict(counted)
    for name, rows in _by_category(requests).items():
        if name in per_category and (always_drafts or per_category[name].num_drafts):
            found["categories"][name]["acceptance"] = figures(per_category[name], rows)
            found["categories"][name]["counters"] = asdict(per_category[name])
    found["tokens_per_step"] = _tokens_per_step(requests)
    found["contexts"] = {}
    for name, rows in _by_context(requests).items() if _are_counted(requests) else ():
        if (counters := _sum(rows, depth)).num_drafts:
            entry = {"requests": len(rows), **summary.latencies(rows)}
            found["contexts"][name] = {**entry, "acceptance": figures(counters, rows)}
    return found


def _are_counted(requests: Requests) -> bool:
    return all(request["counters"] is not None for request in requests)


def _sum(requests: Requests, depth: int) -> Counters:
    parts = (Counters(**request["counters"]) for request in requests)
    return total(parts, num_speculative_tokens=depth)


def _category_counters(
    requests: Requests, parts: Mapping[str | None, Counters], counted: Counters, depth: int
) -> dict[str, Counters]:
    """Counters of each category: the sums of its requests', or those read around it."""
    if None not in parts:
        return {str(name): counters for name, counters in parts.items()}
    if not _are_counted(requests):
        return {}
    if (together := _sum(requests, depth)) != counted:
        raise OutputError(
            f"vLLM's speculative-decoding counters: the requests add up to {together}, the engine "
            f"counted {counted}; something else ran on it.",
            code="counters-of-others",
            remedy="Measure again on an idle server.",
        )
    return {name: _sum(rows, depth) for name, rows in _by_category(requests).items()}


def _tokens_per_step(requests: Requests) -> float | None:
    """Decoded tokens per target step, undrafted ones included; None without counts by request."""
    if not _are_counted(requests):
        return None
    steps = sum(
        decode_steps(Counters(**request["counters"]), output_tokens=len(request["token_ids"]))
        for request in requests
    )
    return sum(len(request["token_ids"]) - 1 for request in requests) / max(steps, 1)


def add_speedup(
    entry: Entry,
    measured: Mapping[str, Any],
    baseline: Entry,
    baseline_measured: Mapping[str, Any],
    seed: int,
) -> None:
    """Speed-up over the baseline at the same load, with its interval, overall and by category."""
    requests, plain = requests_of(measured), requests_of(baseline_measured)

    def add(group: Entry, ours: Requests, theirs: Requests, speedup: float) -> None:
        interval = intervals.speedup_interval(ours, theirs, speedup=speedup, seed=seed)
        group.update(speedup=speedup, speedup_interval=interval)

    add(entry, requests, plain, entry["tokens_per_s"] / baseline["tokens_per_s"])
    if measured["load"]["concurrency"] > 1:
        return
    for groups, grouped in (("categories", _by_category), ("contexts", _by_context)):
        theirs = grouped(plain)
        for name, rows in grouped(requests).items():
            before = summary.request_rate(theirs.get(name, ()))
            after = summary.request_rate(rows)
            if before and after and name in entry[groups]:
                add(entry[groups][name], rows, theirs[name], after / before)
