# SPDX-License-Identifier: Apache-2.0
"""The section `dump` of a recipe."""

from typing import ClassVar, Literal

from shared.config import StageConfig, identity, operational


class DumpConfig(StageConfig):
    """Runs the target over synth's conversations and keeps its hidden states, checked.

    In:  <workspace>/<run>/synth/.
    Out: <workspace>/<run>/dump/shard_*.pt, data_config.json, token_freq.pt, manifest.json.
    """

    section: ClassVar[str] = "dump"
    consumes: ClassVar[tuple[str, ...]] = (
        "target",
        "target_revision",
        "aux_layers",
        "max_length_tokens",
        "trust_remote_code",
    )

    engine: Literal["vllm", "hf"] = identity(
        "vllm", "vllm; or hf for targets whose vLLM model has no capture hooks."
    )
    dtype: str = identity("auto", "The engine's dtype; states are stored as bfloat16.")
    over_long: Literal["truncate", "skip"] = identity(
        "truncate", "What to do with a row longer than run.max_length_tokens."
    )
    shard_bytes: int = identity(1 << 30, "Size at which a shard is closed.", ge=1)

    min_agreement: float = operational(
        0.9,
        "Least share of greedy answer tokens that the stored states must predict; below is exit 3.",
        ge=0,
        le=1,
    )
    max_failed_fraction: float = operational(
        0.0, "More failed rows than this is exit 3.", ge=0, le=1
    )
    batch_tokens: int = operational(8192, "Tokens that the engine takes at once.", ge=1)
    tensor_parallel_size: int = operational(1, "GPUs that share the target's layers.", ge=1)
