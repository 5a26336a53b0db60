# SPDX-License-Identifier: Apache-2.0
"""Benches made up by hand, as adapt reads them."""

import json
from collections.abc import Sequence
from typing import Any

from shared.paths import RunPaths
from shared.settings import build
from stages.bench.config import BenchConfig
from stages.bench.report import report
from tests.measurements import engine, request, under_load

DRAFTS = 100  # of each chat, K = 3


def write_bench(
    paths: RunPaths,
    lengths: Sequence[float],
    *,
    tokens_per_s: float = 100.0,
    is_counted: bool = True,
) -> None:
    """`report.json` and the raw answers of a head.

    Args:
        lengths: the acceptance length of each chat, 1 to 4.
    """
    rows = [_answer(n, length, tokens_per_s) for n, length in enumerate(lengths)]
    wall_s = sum(len(row["token_ids"]) for row in rows) / tokens_per_s
    raw = engine(under_load(rows, wall_s=wall_s))
    if not is_counted:  # as of vLLM before 0.30
        (segment,) = raw["loads"][0]["segments"]
        segment["category"] = "coding"
        segment["requests"] = [{**row, "counters": None} for row in rows]
    found = report.build(build(BenchConfig, {"target": "tiny"}), {"head": raw}, measured={})
    for name, value in (("report.json", found), ("raw/head.json", raw)):
        path = paths.stage("bench") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))


def _answer(n: int, length: float, tokens_per_s: float) -> dict[str, Any]:
    """Accepted tokens of whole drafts, and of one that makes up for the rest."""
    full, rest = divmod(round((length - 1) * DRAFTS), 3)
    histogram = [DRAFTS - full, 0, 0, full]
    if rest:
        histogram[0] -= 1
        histogram[rest] += 1
    tokens = 120
    return request(f"chat-{n}", "coding", histogram, tokens=tokens, latency_s=tokens / tokens_per_s)
