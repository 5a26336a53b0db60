# SPDX-License-Identifier: Apache-2.0
"""The gates: what a head must reach before it ships."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.errors import OutputError
from stages.bench.config import BenchConfig

Gate = dict[str, Any]

_REMEDIES = {
    "acceptance length": "Train on more rows first (5 thousand give about 1.5, hundreds of thousands "
    "2.5 and more), then for more epochs; train's walked acceptance length shows what helps. Where the "
    "head walked well and makes less here, the report's `limit` says how to find out why.",
    "speed-up": "Try a shorter draft or a lower concurrency; on a small CPU target drafting costs "
    "more than it saves.",
    "tokens per step above ngram's": "On text that copies its prompt ngram is hard to beat: train "
    "longer, or lower bench.min_gain_over_ngram.",
    "answers that differ without a tie": "Look at the report's divergences; bench.dtype float32 shows "
    "whether rounding causes them.",
}
_REGRESSION = "`python -m stages.bench compare EARLIER THIS` shows what changed."


def judge(
    config: BenchConfig, report: Mapping[str, Any], earlier: Mapping[str, Any] | None
) -> list[Gate]:
    """Every requested gate: name, value, bound (`min` or `max`), limit and `met`.

    A gate whose value could not be measured is not met.
    """
    return [
        {
            "name": name,
            "value": value,
            "bound": bound,
            "limit": limit,
            "met": value is not None and (value >= limit if bound == "min" else value <= limit),
        }
        for name, value, bound, limit in _requested(config, report, earlier)
        if limit is not None
    ]


def _requested(
    config: BenchConfig, report: Mapping[str, Any], earlier: Mapping[str, Any] | None
) -> Iterator[tuple[str, float | None, str, float | None]]:
    head = report["head"]
    length = head["acceptance"]["acceptance_length"]
    yield "acceptance length", length, "min", config.min_acceptance_length
    yield "speed-up", head.get("speedup"), "min", config.min_speedup
    if "ngram" in report:
        # Not acceptance lengths: ngram's leaves out the steps in which it drafts nothing.
        ours, theirs = (report[name]["tokens_per_step"] for name in ("head", "ngram"))
        gain = None if ours is None or theirs is None else ours - theirs
        yield "tokens per step above ngram's", gain, "min", config.min_gain_over_ngram
    if report["lossless"]:
        found = report["lossless"]
        wrong = found["wrong"] if found["compared"] else None
        yield "answers that differ without a tie", wrong, "max", config.max_wrong_answers
    if earlier:
        kept = 1 - config.max_regression
        before = earlier["head"]
        limit = kept * before["acceptance"]["acceptance_length"]
        yield "acceptance length against the earlier report", length, "min", limit
        if before.get("speedup") is not None:
            limit = kept * before["speedup"]
            yield "speed-up against the earlier report", head.get("speedup"), "min", limit


def shortfalls(gates: list[Gate]) -> list[str]:
    """One sentence for each gate that is missed."""
    found = []
    for gate in gates:
        if gate["met"]:
            continue
        name, value, limit = gate["name"], gate["value"], gate["limit"]
        if value is None:
            found.append(f"{name} was not measured, and the gate requires {limit:g}")
            continue
        side = "under" if gate["bound"] == "min" else "over"
        found.append(f"{name} {value:.3f} is {abs(limit - value):.3f} {side} the gate {limit:g}")
    return found


def require_met(report: Mapping[str, Any], path: Path) -> None:
    """Refuse a head that misses a gate.

    Raises:
        OutputError: with every shortfall; the remedy is the first missed gate's.
    """
    missed = [gate for gate in report["gates"] if not gate["met"]]
    if missed:
        raise OutputError(
            f"{'; '.join(shortfalls(missed))}.",
            code="gate-missed",
            remedy=f"{_REMEDIES.get(missed[0]['name'], _REGRESSION)} The whole report: {path}.",
            facts={
                "report": str(path),
                "missed": [{k: v for k, v in gate.items() if k != "met"} for gate in missed],
            },
        )
