# SPDX-License-Identifier: Apache-2.0
"""From raw measurements to `report.json`, its gates, and what a person sees.

Formulas: acceptance as in `metrics`; tokens/s = answer tokens / wall seconds of the measured
prompts, engine start and warm-up left out; speed-up = tokens/s with the head / without.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from shared import provenance
from stages.bench.config import BenchConfig
from stages.bench.metrics import Counters, acceptance, decode_steps, delta, first_divergence

SCHEMA_VERSION = 1

logger = logging.getLogger(__name__)


def _counters(raw: Mapping[str, Any]) -> Counters:
    return Counters(
        **{**raw, "num_accepted_tokens_per_pos": tuple(raw["num_accepted_tokens_per_pos"])}
    )


def _throughput(raw: Mapping[str, Any]) -> dict[str, Any]:
    tokens = sum(len(request["token_ids"]) for request in raw["requests"])
    return {
        "requests": len(raw["requests"]),
        "output_tokens": tokens,
        "wall_s": raw["wall_s"],
        "tokens_per_s": tokens / raw["wall_s"],
    }


def _drafted(raw: Mapping[str, Any], *, depth: int, always_drafts: bool) -> dict[str, Any]:
    """Throughput and acceptance of one drafting engine, from its counters' difference."""
    counted = delta(_counters(raw["counters_before"]), _counters(raw["counters_after"]))
    figures = acceptance(counted, num_speculative_tokens=depth, always_drafts=always_drafts)
    return {**_throughput(raw), "acceptance": asdict(figures), "counters": asdict(counted)}


def _tokens_per_step(raw: Mapping[str, Any]) -> float | None:
    """Decoded tokens per target step, undrafted steps included; None where vLLM does not tell."""
    requests = raw["requests"]
    if any(request["counters"] is None for request in requests):
        return None
    steps = sum(
        decode_steps(_counters(request["counters"]), output_tokens=len(request["token_ids"]))
        for request in requests
    )
    return sum(len(request["token_ids"]) - 1 for request in requests) / max(steps, 1)


def _divergence(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Requests whose tokens differ, and the first position where they do."""
    found = []
    for a, b in zip(left["requests"], right["requests"], strict=True):
        position = first_divergence(a["token_ids"], b["token_ids"])
        if position is not None:
            found.append({"id": a["id"], "position": position})
    return found


def build(
    config: BenchConfig, results: Mapping[str, Mapping[str, Any]], parent: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole report.

    Raises:
        OutputError: vLLM's counters contradict each other.
    """
    depth = config.num_speculative_tokens
    baseline = _throughput(results["baseline"])
    head = _drafted(results["head"], depth=depth, always_drafts=True)
    head["speedup"] = head["tokens_per_s"] / baseline["tokens_per_s"]
    finished: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run": config.run.name,
        "target": config.run.target,
        "num_speculative_tokens": depth,
        "temperature": config.temperature,
        "concurrency": config.concurrency,
        "vllm_version": results["head"]["vllm_version"],
        "baseline": baseline,
        "head": head,
        "greedy_divergences": _divergence(results["baseline"], results["head"])
        if config.temperature == 0
        else None,
    }
    if "ngram" in results:
        ngram = _drafted(results["ngram"], depth=depth, always_drafts=False)
        ngram["speedup"] = ngram["tokens_per_s"] / baseline["tokens_per_s"]
        ngram["tokens_per_step"] = _tokens_per_step(results["ngram"])
        finished["ngram"] = ngram
    return {**finished, "lineage": dict(parent), "provenance": provenance.collect(argv=sys.argv)}


def missed_gates(config: BenchConfig, finished: Mapping[str, Any]) -> list[str]:
    """One sentence for each gate that the measurement misses."""
    length = finished["head"]["acceptance"]["acceptance_length"]
    gates: list[tuple[str, float, float | None]] = [
        ("acceptance length", length, config.min_acceptance_length),
        ("speed-up", finished["head"]["speedup"], config.min_speedup),
    ]
    if "ngram" in finished:
        gain = length - finished["ngram"]["acceptance"]["acceptance_length"]
        gates.append(("acceptance length above ngram's", gain, config.min_gain_over_ngram))
    return [
        f"{name} {value:.3f} is {least - value:.3f} under the gate {least}"
        for name, value, least in gates
        if least is not None and value < least
    ]


def show(finished: Mapping[str, Any]) -> None:
    """Print the report as a table, for the person who waited."""
    table = Table(title=f"{finished['run']}: K = {finished['num_speculative_tokens']}")
    for column in ("engine", "acceptance length", "rate", "by position", "tokens/s", "speed-up"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name in ("baseline", "ngram", "head"):
        if name not in finished:
            continue
        entry = finished[name]
        figures = entry.get("acceptance")
        cells = ["1.00", "", ""]
        if figures:
            positions = " ".join(f"{share:.2f}" for share in figures["per_position"])
            rate = f"{figures['acceptance_rate']:.2f}"
            cells = [f"{figures['acceptance_length']:.2f}", rate, positions]
        speedup = f"{entry.get('speedup', 1.0):.2f}"
        table.add_row(name, *cells, f"{entry['tokens_per_s']:.1f}", speedup)
    Console(stderr=True, width=100).print(table)
    divergences = finished["greedy_divergences"]
    if divergences:
        logger.info("%d greedy answers differ from the baseline's", len(divergences))
