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

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.artifacts import provenance
from shared.contracts.bench_report import SCHEMA_VERSION
from shared.paths import find_input
from stages.bench.config import BenchConfig
from stages.bench.figures import figures
from stages.bench.measure.plans import engine_name

Raw = Mapping[str, Any]

# vLLM's methods that keep the target's distribution. Of others (`synthetic` in vLLM 0.32) the report warns.
EXACT_VERIFIERS = ("standard", "block")
_MAX_QUEUED_SHARE = 0.1  # of the requests' time
_ACCEPTANCE = ("acceptance_length", "acceptance_length_interval", "acceptance_rate")
Report = dict[str, Any]


def build(
    config: BenchConfig,
    results: Mapping[str, Raw],
    *,
    measured: Mapping[str, Any],
    warnings: Sequence[str] = (),
    drafting: Mapping[str, Any] | None = None,
) -> Report:
    """The whole report but for its gates.

    Args:
        results: the raw measurement under each engine's name.
        measured: what was measured, by fingerprint and hash.
        drafting: what vLLM must be told of the head beside its folder.

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
            {**best, "serve": serve_line(config, best, drafting or {})} for best in _best(sweep)
        ],
        "lossless": plain.get("lossless"),
        "warnings": [*warnings, *_lossy(config), *_cautions(first, sweep)],
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


def serve_line(config: BenchConfig, best: Report, own: Mapping[str, Any]) -> str | None:
    """The command that serves the target at a load: with the head and this K, or alone where that is faster.

    It holds in every folder: local files by their whole paths. None for an endpoint, which is served
    already.
    """
    if config.endpoint:
        return None
    words = ["vllm", "serve", _whole_path(config, config.run.target)]
    if best["speedup"] is None or best["speedup"] >= 1:
        drafting = {
            "method": "eagle3",
            "model": _whole_path(config, config.head or config.paths.export),
        }
        drafting["num_speculative_tokens"] = best["num_speculative_tokens"]
        settings = {**drafting, **own, **config.speculative_args}
        words += ["--speculative-config", json.dumps(settings)]
    if switches := config.run.template_kwargs:
        words += ["--default-chat-template-kwargs", json.dumps(switches)]
    if config.run.chat_template:
        words += ["--chat-template", _whole_path(config, config.run.chat_template)]
    if config.tensor_parallel_size > 1:
        words += ["--tensor-parallel-size", str(config.tensor_parallel_size)]
    for name, value in config.engine_args.items():
        flag = name.replace("_", "-")
        shown = value if isinstance(value, str) else json.dumps(value)
        words += [f"--no-{flag}"] if value is False else [f"--{flag}", shown]
    return shlex.join(words)


def _whole_path(config: BenchConfig, name: str | Path) -> str:
    """The whole path of a file in the workspace or here; a hub id as it is."""
    return str(find_input(str(name), config.workspace) or name)


def _lossy(config: BenchConfig) -> list[str]:
    """What a verifier that is not exact means for the figures."""
    method = config.speculative_args.get("rejection_sample_method", EXACT_VERIFIERS[0])
    if method in EXACT_VERIFIERS:
        return []
    return [
        f"The verifier is lossy: rejection_sample_method {method!r} accepts tokens that the target alone "
        "would not give. The acceptance length and the speed-up are not those of equal answers."
    ]


def _cautions(first: Mapping[str, Report], sweep: Sequence[Report]) -> list[str]:
    """What an operator must not overlook in the figures themselves."""
    head = first["head"]
    found = []
    if head.get("speedup") is not None and head["speedup"] < 1:
        found.append(
            f"Drafting costs more than it saves here (speed-up {head['speedup']:.2f}){_cost(head)}: on a "
            "small target or a busy machine a draft takes as long as the steps that it saves."
        )
    if head["acceptance"]["acceptance_length_interval"] is None:
        found.append(
            "No interval for the acceptance length: too few prompts, or no counts by request."
        )
    for row in sweep:
        if row["queued_share"] > _MAX_QUEUED_SHARE:
            found.append(
                f"{row['drafter']} at concurrency {row['concurrency']}: requests spent "
                f"{row['queued_share']:.0%} of their time in the server's queue, so the load in the "
                "batch was lower. The server's max_num_seqs or KV cache is too small for it."
            )
    if "baseline" not in first:
        found.append("No baseline was measured: there is no speed-up, and nothing was compared.")
    return found


def _cost(head: Report) -> str:
    """What a step with its draft costs: tokens per step / speed-up plain steps."""
    steps = head.get("tokens_per_step")
    if steps is None:
        return ""
    cost = steps / head["speedup"]
    return f"; a step with its draft takes as long as {cost:.1f} plain ones, and gives {steps:.1f} tokens"
