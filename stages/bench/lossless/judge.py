# SPDX-License-Identifier: Apache-2.0
"""The comparison of a whole measurement: every greedy load of every head against the baseline's."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from stages.bench.figures.figures import requests_of
from stages.bench.lossless.divergence import Ask, Divergence, compare, judge

Raw = Mapping[str, Any]


def _greedy_loads(raw: Raw) -> Iterable[tuple[tuple[int, int], list[Any]]]:
    """((concurrency, max_tokens), rows) of each load at temperature 0."""
    for entry in raw["loads"]:
        load = entry["load"]
        if load["temperature"] == 0:
            yield (load["concurrency"], load["max_tokens"]), requests_of(entry)


def judged(baseline: Raw, others: Mapping[str, Raw], ask: Ask) -> dict[str, Any] | None:
    """The report's section on losslessness; None where nothing was greedy.

    Costs nothing where every answer is identical; otherwise a few short requests.
    """
    plain = dict(_greedy_loads(baseline))
    if not plain:
        return None
    compared, prompts_differ, found = 0, 0, list[Divergence]()
    for name, other in others.items():
        for (concurrency, max_tokens), rows in _greedy_loads(other):
            where = {"engine": name, "concurrency": concurrency, "max_tokens": max_tokens}
            counts = compare(plain[concurrency, max_tokens], rows, **where)
            compared, prompts_differ = compared + counts[0], prompts_differ + counts[1]
            found += counts[2]
    noise: dict[str, Any] = {"noise_logits": None, "contexts_scored": 0, "changes_measured": 0}
    if found:
        touched = {(d.id, d.turn) for d in found}
        rows = [row for row in next(iter(plain.values())) if row["token_ids"]]
        undisturbed = [row for row in rows if (row["id"], row["turn"]) not in touched]
        found, noise = judge(found, undisturbed, ask)
    verdicts = [divergence.verdict for divergence in found]
    shown = [{k: v for k, v in asdict(d).items() if k != "context"} for d in found]
    return {
        "compared": compared,
        "prompts_differ": prompts_differ,
        "identical": compared - len(found),
        "ties": verdicts.count("tie"),
        "wrong": verdicts.count("wrong"),
        **noise,
        "divergences": shown,
    }
