# SPDX-License-Identifier: Apache-2.0
"""The gates: what a head must reach before it ships."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.errors import UserError
from stages.bench.config import BenchConfig
from stages.bench.measure.cells import cells

Gate = dict[str, Any]


def judge(
    config: BenchConfig, report: Mapping[str, Any], earlier: Mapping[str, Any] | None
) -> list[Gate]:
    """Every gate that was asked for: name, value, bound (`least` or `most`), and `met`.

    A gate whose value could not be measured is not met.
    """
    return [
        {
            "name": name,
            "value": value,
            "bound": bound,
            "limit": limit,
            "met": _met(value, bound, limit),
        }
        for name, value, bound, limit in _asked(config, report, earlier)
        if limit is not None
    ]


def _met(value: float | None, bound: str, limit: float) -> bool:
    return value is not None and (value >= limit if bound == "least" else value <= limit)


def _asked(
    config: BenchConfig, report: Mapping[str, Any], earlier: Mapping[str, Any] | None
) -> Iterator[tuple[str, float | None, str, float | None]]:
    head = report["head"]
    length = head["acceptance"]["acceptance_length"]
    yield "acceptance length", length, "least", config.min_acceptance_length
    yield "speed-up", head.get("speedup"), "least", config.min_speedup
    if "ngram" in report:
        gain = length - report["ngram"]["acceptance"]["acceptance_length"]
        yield "acceptance length above ngram's", gain, "least", config.min_gain_over_ngram
    if report["lossless"]:
        found = report["lossless"]
        wrong = found["wrong"] + found["not_scored"] if found["compared"] else None
        yield "answers that differ without a tie", wrong, "most", config.max_wrong_answers
    if earlier:
        kept = 1 - config.max_regression
        before = earlier["head"]
        least = kept * before["acceptance"]["acceptance_length"]
        yield "acceptance length against the earlier report", length, "least", least
        if before.get("speedup") is not None:
            least = kept * before["speedup"]
            yield "speed-up against the earlier report", head.get("speedup"), "least", least


def shortfalls(gates: list[Gate]) -> list[str]:
    """One sentence for each gate that is missed."""
    found = []
    for gate in gates:
        if gate["met"]:
            continue
        name, value, limit = gate["name"], gate["value"], gate["limit"]
        if value is None:
            found.append(f"{name} was not measured, and the gate asks for {limit:g}")
            continue
        side = "under" if gate["bound"] == "least" else "over"
        found.append(f"{name} {value:.3f} is {abs(limit - value):.3f} {side} the gate {limit:g}")
    return found


def check_comparable(
    config: BenchConfig, prompts: str, earlier: Mapping[str, Any], path: Path
) -> None:
    """Refuse to hold a run against one that measured something else, before it is measured.

    Raises:
        UserError: with the settings that differ.
    """
    load = cells(config)[0]
    ours = {
        "num_speculative_tokens": config.num_speculative_tokens[0],
        "concurrency": load.concurrency,
        "temperature": load.temperature,
        "max_tokens": load.max_tokens,
        "target": config.run.target,
        "mode": config.measured_through,
        "max_prompts": config.max_prompts,
        "prompts": prompts,
    }
    theirs = {
        **{name: earlier.get(name) for name in ours},
        "prompts": earlier["lineage"]["prompts"],
    }
    found = [
        f"{name}: {theirs[name]} then, {ours[name]} now"
        for name in ours
        if theirs[name] != ours[name]
    ]
    if found:
        raise UserError(
            f"bench.earlier_report: {path} was measured otherwise ({'; '.join(found)}). "
            "Give a report of the same load and prompts."
        )
