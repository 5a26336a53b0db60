# SPDX-License-Identifier: Apache-2.0
"""The comparison of a whole measurement: every greedy cell of every head against the baseline's."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from stages.bench.lossless.divergence import Ask, Divergence, compare, judge

Raw = Mapping[str, Any]


def _greedy_cells(raw: Raw) -> Iterable[tuple[tuple[int, int], list[Any]]]:
    """((concurrency, max_tokens), rows) of each cell at temperature 0."""
    for entry in raw["cells"]:
        cell = entry["cell"]
        if cell["temperature"] == 0:
            rows = [row for segment in entry["segments"] for row in segment["requests"]]
            yield (cell["concurrency"], cell["max_tokens"]), rows


def judged(baseline: Raw, others: Mapping[str, Raw], ask: Ask) -> dict[str, Any] | None:
    """What the report says of losslessness; None where nothing was greedy.

    Costs nothing where every answer is identical; otherwise a few short requests.
    """
    plain = dict(_greedy_cells(baseline))
    if not plain:
        return None
    compared, apart, found = 0, 0, list[Divergence]()
    for name, other in others.items():
        for (concurrency, longest), rows in _greedy_cells(other):
            where = {"engine": name, "concurrency": concurrency, "max_tokens": longest}
            same, differing, parted = compare(plain[concurrency, longest], rows, **where)
            compared, apart, found = compared + same, apart + differing, found + parted
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
        "prompts_differ": apart,
        "identical": compared - len(found),
        "ties": verdicts.count("tie"),
        "wrong": verdicts.count("wrong"),
        "not_scored": verdicts.count("not scored"),
        **noise,
        "divergences": shown,
    }
