# SPDX-License-Identifier: Apache-2.0
"""From raw measurements to `report.json`.

    baseline, head, ngram   the figures at the first load and the first K: what the gates ask
    sweep                   one row for each load, drafter and K: lengths, rates, latencies, speed-up
    best                    the K to serve with at each load
    lossless                greedy answers against the baseline's, every divergence with its verdict
    gates                   name, value, bound and whether it is met
    warnings                what was found odd about the head or the measurement
    seconds                 what measuring took, engine starts and all
    making                  how the head was made, where this run made it: stages, loss, walks

Figures as in `figures`; an interval is [low, high] at 95 %, or null where nothing tells it.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shared.artifacts import provenance
from shared.contracts.bench_report import SCHEMA_VERSION
from stages.bench.config import BenchConfig
from stages.bench.figures import figures
from stages.bench.measure.plans import engine_name

Raw = Mapping[str, Any]
Report = dict[str, Any]


def build(
    config: BenchConfig,
    results: Mapping[str, Raw],
    *,
    lineage: Mapping[str, Any],
    warnings: Sequence[str] = (),
) -> Report:
    """The whole report but for its gates.

    Args:
        results: the raw measurement under each engine's name.
        lineage: what was measured, by fingerprint and hash.

    Raises:
        OutputError: vLLM's counters contradict each other.
    """
    entries = {(name, at): entry for name, at, entry in _entries(config, results)}
    first = {
        name: entries[name, 0] for name in ("baseline", "head", "ngram") if (name, 0) in entries
    }
    sweep = list(_sweep(config, results, entries))
    cell = results["head"]["cells"][0]["cell"]
    plain = results.get("baseline", {})
    return {
        "schema_version": SCHEMA_VERSION,
        "run": config.run.name,
        "target": config.run.target,
        "mode": config.measured_through,
        "max_prompts": config.max_prompts,
        "num_speculative_tokens": config.num_speculative_tokens[0],
        **cell,
        "vllm_version": results["head"]["vllm_version"],
        **first,
        "sweep": sweep,
        "best": _best(sweep),
        "lossless": plain.get("lossless"),
        "warnings": [*warnings, *_cautions(first)],
        "lineage": dict(lineage),
        "provenance": provenance.collect(argv=sys.argv),
    }


def _entries(config: BenchConfig, results: Mapping[str, Raw]) -> Iterator[tuple[str, int, Report]]:
    """(engine, number of the cell, figures) of everything that was measured."""
    seed = config.run.seed
    baseline = results.get("baseline")
    plain = [figures.throughput(cell) for cell in baseline["cells"]] if baseline else []
    for at, entry in enumerate(plain):
        yield "baseline", at, entry
    for drafter in ("head", "ngram"):
        for depth in config.num_speculative_tokens:
            name = engine_name(config, drafter, depth)
            for at, cell in enumerate(results.get(name, {}).get("cells", ())):
                always = drafter == "head"
                entry = figures.drafted(cell, depth=depth, always_drafts=always, seed=seed)
                if baseline:
                    figures.add_speedup(entry, cell, plain[at], baseline["cells"][at], seed)
                yield name, at, entry


def _sweep(
    config: BenchConfig, results: Mapping[str, Raw], entries: Mapping[tuple[str, int], Report]
) -> Iterator[Report]:
    for (name, at), entry in entries.items():
        drafter, _, depth = name.partition("-k")
        known = entry.get("acceptance", {})
        yield {
            "drafter": drafter,
            "num_speculative_tokens": 0
            if drafter == "baseline"
            else int(depth or config.num_speculative_tokens[0]),
            **results[name]["cells"][at]["cell"],
            "tokens_per_s": entry["tokens_per_s"],
            "ttft_s": entry["ttft_s"],
            "tpot_s": entry["tpot_s"],
            "acceptance_length": known.get("acceptance_length"),
            "acceptance_length_interval": known.get("acceptance_length_interval"),
            "acceptance_rate": known.get("acceptance_rate"),
            "speedup": entry.get("speedup"),
            "speedup_interval": entry.get("speedup_interval"),
        }


def _best(sweep: Sequence[Report]) -> list[Report]:
    """The head's fastest K at each load; without a baseline, by tokens/s all the same."""
    loads: dict[tuple[Any, ...], Report] = {}
    axes = ("concurrency", "temperature", "max_tokens")
    for row in sweep:
        load = tuple(row[axis] for axis in axes)
        if row["drafter"] == "head" and (
            load not in loads or row["tokens_per_s"] > loads[load]["tokens_per_s"]
        ):
            loads[load] = row
    kept = (*axes, "num_speculative_tokens", "tokens_per_s", "speedup", "speedup_interval")
    return [{key: row[key] for key in kept} for row in loads.values()]


def _cautions(first: Mapping[str, Report]) -> list[str]:
    """What an operator must not overlook in the figures themselves."""
    head = first["head"]
    found = []
    if head.get("speedup") is not None and head["speedup"] < 1:
        found.append(
            f"Drafting costs more than it saves here (speed-up {head['speedup']:.2f}): on a small "
            "target or a busy machine a draft takes as long as the steps that it spares."
        )
    if head["acceptance"]["acceptance_length_interval"] is None:
        found.append(
            "No interval for the acceptance length: too few prompts, or no counts by request."
        )
    if "baseline" not in first:
        found.append("No baseline was measured: there is no speed-up, and nothing was compared.")
    return found
