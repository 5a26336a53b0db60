# SPDX-License-Identifier: Apache-2.0
"""The figures of one engine under one load, overall and by category.

In: a cell of a raw measurement. Out: JSON values for the report. Formulas: acceptance as in
`metrics`, statistics as in `summary`, and

    tokens/s        = answer tokens / wall seconds (engine start and warm-up left out)
    speed-up        = tokens/s with the drafter / without, at the same load
    of a category   = the same of its requests' own time, since its wall time is not its own
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from shared.errors import OutputError
from stages.bench.figures import summary
from stages.bench.figures.metrics import Counters, acceptance, decode_steps, delta, total

Entry = dict[str, Any]
Requests = Sequence[Mapping[str, Any]]


def counters_of(raw: Mapping[str, Any]) -> Counters:
    """Counters from their JSON form."""
    return Counters(
        **{**raw, "num_accepted_tokens_per_pos": tuple(raw["num_accepted_tokens_per_pos"])}
    )


def requests_of(cell: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every answer of a cell."""
    return [row for segment in cell["segments"] for row in segment["requests"]]


def throughput(cell: Mapping[str, Any]) -> Entry:
    """Tokens, wall time and latencies; what a baseline has."""
    requests = requests_of(cell)
    tokens = sum(len(request["token_ids"]) for request in requests)
    wall_s = sum(segment["wall_s"] for segment in cell["segments"])
    return {
        "requests": len(requests),
        "output_tokens": tokens,
        "wall_s": wall_s,
        "tokens_per_s": tokens / wall_s,
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


def drafted(cell: Mapping[str, Any], *, depth: int, always_drafts: bool, seed: int) -> Entry:
    """The same and the acceptance, from the counters' differences.

    Raises:
        OutputError: vLLM's counters contradict each other, or the requests' do not add up to them.
    """
    found = throughput(cell)
    requests = requests_of(cell)
    parts = {
        segment["category"]: delta(
            counters_of(segment["counters_before"]), counters_of(segment["counters_after"])
        )
        for segment in cell["segments"]
    }
    counted = total(parts.values(), num_speculative_tokens=depth)
    per_category = _category_counters(requests, parts, counted, depth)

    def figures(counters: Counters, rows: Requests) -> Entry:
        known = acceptance(counters, num_speculative_tokens=depth, always_drafts=always_drafts)
        interval = summary.acceptance_length_interval(rows, seed=seed)
        return {**asdict(known), "acceptance_length_interval": interval}

    found["acceptance"] = figures(counted, requests)
    found["counters"] = asdict(counted)
    for name, rows in _by_category(requests).items():
        if name in per_category and (always_drafts or per_category[name].num_drafts):
            found["categories"][name]["acceptance"] = figures(per_category[name], rows)
            found["categories"][name]["counters"] = asdict(per_category[name])
    if not always_drafts:
        found["tokens_per_step"] = _tokens_per_step(requests)
    return found


def _category_counters(
    requests: Requests, parts: Mapping[str | None, Counters], counted: Counters, depth: int
) -> dict[str, Counters]:
    """Counters of each category: the sums of its requests', or those read around it."""
    if None not in parts:
        return {str(name): counters for name, counters in parts.items()}
    if any(request["counters"] is None for request in requests):
        return {}
    by_category = {
        name: total((counters_of(row["counters"]) for row in rows), num_speculative_tokens=depth)
        for name, rows in _by_category(requests).items()
    }
    together = total(by_category.values(), num_speculative_tokens=depth)
    if together != counted:
        raise OutputError(
            f"vLLM's speculative-decoding counters: the requests add up to {together}, the engine "
            f"counted {counted}. Something else ran on it: measure again on an idle one."
        )
    return by_category


def _tokens_per_step(requests: Requests) -> float | None:
    """Decoded tokens per target step, undrafted steps included; None where vLLM does not tell."""
    if any(request["counters"] is None for request in requests):
        return None
    steps = sum(
        decode_steps(counters_of(request["counters"]), output_tokens=len(request["token_ids"]))
        for request in requests
    )
    return sum(len(request["token_ids"]) - 1 for request in requests) / max(steps, 1)


def add_speedup(
    entry: Entry,
    cell: Mapping[str, Any],
    baseline: Entry,
    baseline_cell: Mapping[str, Any],
    seed: int,
) -> None:
    """Speed-up over the baseline at the same load, with its interval, overall and by category."""
    requests, plain = requests_of(cell), requests_of(baseline_cell)
    speedup = entry["tokens_per_s"] / baseline["tokens_per_s"]
    entry["speedup"] = speedup
    entry["speedup_interval"] = summary.speedup_interval(
        requests, plain, speedup=speedup, seed=seed
    )
    theirs = _by_category(plain)
    for name, rows in _by_category(requests).items():
        of_category = entry["categories"][name]
        before = baseline["categories"].get(name, {}).get("request_tokens_per_s")
        after = of_category["request_tokens_per_s"]
        ratio = after / before if after and before else None
        of_category["speedup"] = ratio
        of_category["speedup_interval"] = (
            summary.speedup_interval(rows, theirs[name], speedup=ratio, seed=seed)
            if ratio
            else None
        )
