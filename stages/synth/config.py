# SPDX-License-Identifier: Apache-2.0
"""The section `synth` of a recipe."""

from typing import Any, ClassVar

from shared.config import StageConfig, identity, operational


class SynthConfig(StageConfig):
    """Answers prompts with the target's own vLLM server and writes Parquet with its token ids.

    In:  a JSON-lines file of prompts (`prompt` or `messages`; `id` and `category` if you have them).
    Out: <workspace>/<run>/synth/part-*.parquet, rejects.jsonl, manifest.json.
    """

    section: ClassVar[str] = "synth"
    consumes: ClassVar[tuple[str, ...]] = (
        "target",
        "target_revision",
        "max_length_tokens",
        "seed",
        "trust_remote_code",
    )

    prompts: str = identity(..., "JSON-lines file of prompts (workspace first).")
    max_tokens: int = identity(1024, "Longest answer; run.max_length_tokens bounds it too.", ge=1)
    temperature: float = identity(0.0, "Sampling temperature; 0 is greedy.", ge=0)
    top_p: float = identity(1.0, "Nucleus sampling.", gt=0, le=1)
    dtype: str = identity("auto", "The server's dtype.")

    concurrency: int = operational(64, "Requests in flight.", ge=1)
    rows_per_part: int = operational(500, "Rows a Parquet part; a kill loses at most these.", ge=1)
    max_failed_fraction: float = operational(
        0.02, "More failed rows than this is exit 3.", ge=0, le=1
    )
    max_retries: int = operational(
        5, "Attempts after the first, for a row that may yet succeed.", ge=0
    )
    request_timeout_s: float = operational(600.0, "Longest wait for one answer.", gt=0)
    startup_timeout_s: float = operational(1800.0, "Longest wait for the server's start.", gt=0)
    tensor_parallel_size: int = operational(1, "GPUs that share the target's layers.", ge=1)
    server_args: dict[str, Any] = operational({}, "More vLLM server options by their own names.")
