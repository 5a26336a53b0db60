# SPDX-License-Identifier: Apache-2.0
"""Reads a vLLM server's `/metrics`: Prometheus' text format, by prometheus-client's own parser.

In: the text. Out: the speculative-decoding counters, what runs, what was answered. A server has one
sample for each data-parallel rank, so everything is summed. A counter's sample carries `_total`
while its family does not.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from stages.bench.figures.metrics import Counters

_DRAFTING = "vllm:spec_decode_num_"
_QUEUE = "vllm:request_queue_time_seconds_sum"
_READ = {
    f"{_DRAFTING}drafts",
    f"{_DRAFTING}draft_tokens",
    f"{_DRAFTING}accepted_tokens",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:request_success",
    _QUEUE,
}


@dataclass(frozen=True)
class Reading:
    """A server at one moment, over all its ranks."""

    counters: Counters | None  # None where it does not draft
    unfinished: int  # requests running or waiting
    answered: int  # requests ended since the server started
    queue_s: float  # time that requests spent waiting for a place in the batch
    text: str


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"expected a count, found {value}")
    return value


def parse(text: str) -> Reading:
    """The reading in a `/metrics` text.

    Raises:
        ValueError: not Prometheus' text format, or no vLLM behind it.
    """
    sums: dict[str, float] = defaultdict(float)
    per_pos: dict[int, float] = defaultdict(float)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"{_DRAFTING}accepted_tokens_per_pos_total":
                    per_pos[int(sample.labels["position"])] += _finite(sample.value)
                elif sample.name.removesuffix("_total") in _READ:
                    sums[sample.name] += _finite(sample.value)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"not Prometheus' text format: {error!r}") from error
    if "vllm:num_requests_running" not in sums:
        raise ValueError("no vllm:num_requests_running in it")
    counters = None
    if per_pos:
        counters = Counters(
            int(sums[f"{_DRAFTING}drafts_total"]),
            int(sums[f"{_DRAFTING}draft_tokens_total"]),
            int(sums[f"{_DRAFTING}accepted_tokens_total"]),
            tuple(int(per_pos[position]) for position in sorted(per_pos)),
        )
    unfinished = sums["vllm:num_requests_running"] + sums["vllm:num_requests_waiting"]
    answered = int(sums["vllm:request_success_total"])
    return Reading(counters, int(unfinished), answered, sums[_QUEUE], text)
