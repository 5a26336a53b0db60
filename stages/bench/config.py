# SPDX-License-Identifier: Apache-2.0
"""The section `bench` of a recipe."""

from typing import Any, ClassVar

from shared.config import StageConfig, identity, operational


class BenchConfig(StageConfig):
    """Measures the draft head in vLLM: the same prompts without it and with it.

    In:  <workspace>/<run>/export/ and a JSON-lines file of prompts that no training has seen.
    Out: <workspace>/<run>/bench/report.json; exit 3 where a gate is missed.
    """

    section: ClassVar[str] = "bench"
    consumes: ClassVar[tuple[str, ...]] = (
        "target",
        "target_revision",
        "max_length_tokens",
        "seed",
        "trust_remote_code",
    )

    prompts: str = identity(..., "JSON-lines file of held-out prompts (workspace first).")
    num_speculative_tokens: int = identity(3, "Draft length K.", ge=1)
    max_tokens: int = identity(256, "Longest answer.", ge=1)
    temperature: float = identity(0.0, "Sampling temperature; 0 is greedy.", ge=0)
    concurrency: int = identity(1, "Requests in flight.", ge=1)
    dtype: str = identity("auto", "The engine's dtype.")
    compare_ngram: bool = identity(False, "Measure vLLM's own ngram proposer at the same K too.")

    min_acceptance_length: float = identity(2.1, "Gate: a lower acceptance length is exit 3.", ge=0)
    min_gain_over_ngram: float | None = identity(
        None, "Gate: least acceptance length above the ngram proposer's; needs compare_ngram."
    )
    min_speedup: float | None = identity(
        None, "Gate: least speed-up; off by default, since on a tiny target drafting may cost more."
    )

    tensor_parallel_size: int = operational(1, "GPUs that share the target's layers.", ge=1)
    engine_timeout_s: float = operational(
        3600.0, "Longest time for one engine's measurement.", gt=0
    )
    engine_args: dict[str, Any] = operational({}, "More vLLM engine options by their own names.")
