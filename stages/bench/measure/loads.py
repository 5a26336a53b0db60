# SPDX-License-Identifier: Apache-2.0
"""What is measured: the loads of a sweep.

A load is one setting of concurrency, temperature and answer length on a running engine. K and the
drafter belong to the engine, so each of those is another engine.

Worked example: concurrency (1, 8), temperature (0,), max_tokens (256,) and K (3, 5) are two loads
on each of three engines: the baseline, the head with K = 3 and the head with K = 5.
"""

import itertools
from dataclasses import dataclass

from stages.bench.config import BenchConfig


@dataclass(frozen=True)
class Load:
    """One load on an engine."""

    concurrency: int
    temperature: float
    max_tokens: int


def loads_of(config: BenchConfig) -> list[Load]:
    """Every load of the sweep; the gates ask the first one."""
    axes = itertools.product(config.temperature, config.max_tokens, config.concurrency)
    return [
        Load(concurrency, temperature, max_tokens) for temperature, max_tokens, concurrency in axes
    ]
