# SPDX-License-Identifier: Apache-2.0
"""From raw measurements to `report.json`.

    baseline, head, ngram   the figures at the first load and the first K, which the gates judge
    sweep                   one row for each load, drafter and K: lengths, rates, latencies, speed-up
    best                    the K to serve with at each load, and the command that does
    lossless                greedy answers against the baseline's, every divergence with its verdict
    gates                   name, value, bound and whether it is met
    warnings                what is unusual about the head or the measurement
    seconds                 how long measuring took, engine starts included
    measured                what was measured, by fingerprint and hash
    lineage                 how the head was made, where this run made it: stages, loss, walks
    limit                   what holds that head back, and the next step that would help most

Figures as in `figures`; an interval is [low, high] at 95 %, or null where it cannot be computed.
"""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shared.artifacts import provenance
from shared.contracts.bench_report import SCHEMA_VERSION
from shared.paths import find_input
from shared.vllm.server import flags
from stages.bench.config import BenchConfig
from stages.bench.figures import figures
from stages.bench.measure.plans import engine_name
from stages.bench.report.cautions import busy, cautions, lossy

Raw = Mapping[str, Any]

_ACCEPTANCE = ("acceptance_length", "acceptance_length_interval", "acceptance_rate")
Report = dict[str, Any]


def build(
    config: BenchConfig,
    results: Mapping[str, Raw],
    *,
    measured: Mapping[str, Any],
    warnings: Sequence[str] = (),
    drafting: Mapping[str, Any] | None = None,
    serving: Mapping[str, Any] | None = None,
) -> Report:
    """The whole report but for its gates.

    Args:
        results: the raw measurement under each engine's name.
        measured: what was measured, by fingerprint and hash.
        drafting: what vLLM must be told of the head beside its folder.
        serving: what a server must be told of the target beside its name.

    Raises:
        OutputError: vLLM's counters contradict each other.
    """
    entries = {(name, index): entry for name, index, entry in _entries(config, results)}
    first = {
        name: entries[name, 0] for name in ("baseline", "head", "ngram") if (name, 0) in entries
    }
    sweep = list(_sweep(config, results, entries))
    load = results["head"]["loads"][0]["load"]
    plain = results.get("baseline", {})
    return {
        "schema_version": SCHEMA_VERSION,
        "run": config.run.name,
        "target": config.run.target,
        "mode": config.measured_through,
        "max_prompts": config.max_prompts,
        "num_speculative_tokens": config.num_speculative_tokens[0],
        **load,
        "vllm_version": results["head"]["vllm_version"],
        **first,
        "sweep": sweep,
        "best": [
            {**best, "serve": serve_line(config, best, drafting or {}, serving or {})}
            for best in _best(sweep)
        ],
        "lossless": plain.get("lossless"),
        "warnings": [*warnings, *lossy(config), *busy(results), *cautions(first, sweep)],
        "measured": dict(measured),
        "provenance": provenance.collect(argv=sys.argv),
    }


def _entries(config: BenchConfig, results: Mapping[str, Raw]) -> Iterator[tuple[str, int, Report]]:
    """(engine, index of the load, figures) of everything that was measured."""
    seed = config.run.seed
    baseline = results.get("baseline")
    plain = [figures.throughput(measured) for measured in baseline["loads"]] if baseline else []
    for index, entry in enumerate(plain):
        yield "baseline", index, entry
    for drafter in ("head", "ngram"):
        for depth in config.num_speculative_tokens:
            name = engine_name(config, drafter, depth)
            for index, measured in enumerate(results.get(name, {}).get("loads", ())):
                always = drafter == "head"
                entry = figures.drafted(measured, depth=depth, always_drafts=always, seed=seed)
                if baseline:
                    figures.add_speedup(
                        entry, measured, plain[index], baseline["loads"][index], seed
                    )
                yield name, index, entry


def _sweep(
    config: BenchConfig, results: Mapping[str, Raw], entries: Mapping[tuple[str, int], Report]
) -> Iterator[Report]:
    for (name, index), entry in entries.items():
        drafter, _, depth = name.partition("-k")
        known = entry.get("acceptance", {})
        yield {
            "drafter": drafter,
            "num_speculative_tokens": 0
            if drafter == "baseline"
            else int(depth or config.num_speculative_tokens[0]),
            **results[name]["loads"][index]["load"],
            **{key: entry[key] for key in ("tokens_per_s", "queued_share", "ttft_s", "tpot_s")},
            **{key: entry.get(key) for key in ("tokens_per_step", "speedup", "speedup_interval")},
            **{key: known.get(key) for key in _ACCEPTANCE},
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


def serve_line(
    config: BenchConfig, best: Report, own: Mapping[str, Any], serving: Mapping[str, Any]
) -> str | None:
    """The command that serves the target at a load: with the head and this K, or alone where that is faster.

    It holds in every folder: local files by their whole paths. None for an endpoint, which is served
    already.
    """
    if config.endpoint:
        return None
    name, revision = _source(config, config.run.target, config.run.target_revision)
    options: dict[str, Any] = {"revision": revision}
    if best["speedup"] is None or best["speedup"] >= 1:
        options["speculative-config"] = _drafting(config, best, own)
    options |= {
        "default-chat-template-kwargs": config.run.template_kwargs or None,
        **serving,
        "tensor-parallel-size": config.tensor_parallel_size,
        **config.engine_options,
    }
    defaults = {"dtype": "auto", "tensor-parallel-size": 1}
    options = {key: each for key, each in options.items() if each != defaults.get(key)}
    return shlex.join(["vllm", "serve", name, *flags(options)])


def _drafting(config: BenchConfig, best: Report, own: Mapping[str, Any]) -> dict[str, Any]:
    """`speculative_config` with the head and the K of a load."""
    name, revision = _source(config, str(config.head or config.paths.export), config.head_revision)
    return {
        "method": "eagle3",
        "model": name,
        **({"revision": revision} if revision else {}),
        "num_speculative_tokens": best["num_speculative_tokens"],
        **own,
        **config.speculative_args,
    }


def _source(config: BenchConfig, name: str, revision: str | None) -> tuple[str, str | None]:
    """The whole path of what lies in the workspace or here; a hub id as it is, with its revision."""
    found = find_input(name, config.workspace)
    return (name, revision) if found is None else (str(found), None)
