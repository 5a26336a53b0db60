# SPDX-License-Identifier: Apache-2.0
"""Raw measurements made up by hand, as an engine would leave them: no engine, every count known.

Answer n of a category takes `drafts` drafts of K = 3 with accepted tokens as its histogram says.
Times are set, so that throughput and latencies are known too.
"""

from dataclasses import asdict
from typing import Any

from stages.bench.figures.metrics import Counters, total

CATEGORIES = ("coding", "writing")


def request(
    name: str,
    category: str,
    histogram: list[int] | None,
    *,
    tokens: int,
    latency_s: float,
    turn: int = 0,
) -> dict[str, Any]:
    """One answer; `histogram` [K+1] counts its drafts by accepted tokens, None without a drafter."""
    counters = None
    if histogram is not None:
        depth = len(histogram) - 1
        counters = Counters.from_histogram(histogram, draft_tokens=depth * sum(histogram))
    return {
        "id": name,
        "turn": turn,
        "category": category,
        "prompt_token_ids": [1, 2, 3],
        "token_ids": list(range(tokens)),
        "finish_reason": "stop",
        "ttft_s": 0.1,
        "latency_s": latency_s,
        "counters": counters and asdict(counters),
    }


def under_load(
    requests: list[dict[str, Any]],
    *,
    wall_s: float,
    concurrency: int = 1,
    temperature: float = 0.0,
    max_tokens: int = 256,
    depth: int = 3,
    queue_s: float = 0.0,
) -> dict[str, Any]:
    """One closed loop under a load; the engine had counted a warm-up before it."""
    before = after = None
    if requests[0]["counters"]:
        parts = [Counters(**row["counters"]) for row in requests]
        parts = [
            Counters(
                **{**asdict(p), "num_accepted_tokens_per_pos": tuple(p.num_accepted_tokens_per_pos)}
            )
            for p in parts
        ]
        warm = Counters(5, 5 * depth, 2, (2, *[0] * (depth - 1)))
        before, after = asdict(warm), asdict(total([warm, *parts], num_speculative_tokens=depth))
    return {
        "load": {"concurrency": concurrency, "temperature": temperature, "max_tokens": max_tokens},
        "segments": [
            {
                "category": None,
                "wall_s": wall_s,
                "queue_s": queue_s,
                "counters_before": before,
                "counters_after": after,
                "requests": requests,
            }
        ],
    }


def engine(*loads: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A raw measurement of one engine."""
    return {"vllm_version": "0.0.0", "start_s": 1.0, "loads": list(loads), **more}


def head_requests(scale: float = 1.0) -> list[dict[str, Any]]:
    """Four answers: 10 drafts with 19 accepted (coding), 10 with 10 (writing), each twice."""
    return [
        request(f"{category}-{n}", category, histogram, tokens=30, latency_s=scale * (1.0 + n))
        for category, histogram in zip(CATEGORIES, ([2, 1, 3, 4], [4, 3, 2, 1]), strict=True)
        for n in range(2)
    ]


def baseline_requests(scale: float = 2.0) -> list[dict[str, Any]]:
    """The same answers without drafts, each in twice the time."""
    return [
        {**row, "latency_s": scale * row["latency_s"], "counters": None} for row in head_requests()
    ]


def lossless(**more: Any) -> dict[str, Any]:
    """What a baseline says of a head whose answers are all identical."""
    return {
        "compared": 4,
        "prompts_differ": 0,
        "identical": 4,
        "ties": 0,
        "wrong": 0,
        "noise_logits": None,
        "contexts_scored": 0,
        "changes_measured": 0,
        "divergences": [],
        **more,
    }
