# SPDX-License-Identifier: Apache-2.0
"""The section `dump` of a recipe."""

from typing import ClassVar, Literal, Self

import pydantic

from shared.artifacts.sharding import ShardedConfig
from shared.config import identity, operational
from shared.target.special_tokens import POLICY_DOC, Policy


class DumpConfig(ShardedConfig):
    """Runs the target over conversations and keeps its hidden states, checked.

    In:  <workspace>/<run>/synth/, or --conversations, or --states.
    Out: <workspace>/<run>/dump/shard_*.pt, data_config.json, token_freq.pt, manifest.json.
    """

    section: ClassVar[str] = "dump"
    consumes: ClassVar[tuple[str, ...]] = (
        "target",
        "target_revision",
        "target_train",
        "aux_layers",
        "max_length_tokens",
        "reasoning",
        "chat_template",
        "chat_template_kwargs",
        "trust_remote_code",
    )

    conversations: str | None = identity(
        None,
        "Finished conversations instead of synth's: file, folder, glob (workspace first) or hub "
        "data set. The target's chat template gives their token ids.",
    )
    states: str | None = identity(
        None,
        "Hidden states made elsewhere, instead of capturing: a folder of ModelOpt's or "
        "speculators' .pt, a file a conversation. They are checked and become this artifact.",
    )
    special_token_text: Policy = identity("skip", f"Of --conversations. {POLICY_DOC}")
    backend: Literal["vllm", "hf", "trtllm", "auto"] = identity(
        "vllm",
        "vllm; hf for targets whose vLLM model has no hooks; trtllm where TensorRT-LLM is installed; "
        "auto asks vLLM whether it shall be vllm or hf.",
    )
    layout: Literal["shards", "samples"] = identity(
        "shards", "shards: files of shard_bytes; samples: a file a sample, as speculators 0.3 has."
    )
    dtype: str = identity("auto", "What the target computes in; states are stored as bfloat16.")
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
    max_logprob_gap: float = operational(
        0.1,
        "Most nats, on average, between a probe row's log-probabilities rebuilt from its stored "
        "states and the engine's own; above is exit 3.",
        gt=0,
    )
    max_failed_fraction: float = operational(
        0.0, "More failed rows than this is exit 3.", ge=0, le=1
    )
    batch_tokens: int = operational(8192, "Tokens that the engine takes at once.", ge=1)
    tensor_parallel_size: int = operational(1, "GPUs that share the target's layers.", ge=1)
    expert_parallel_size: int = operational(
        1, "How many of those the experts are dealt out to; backend: trtllm alone.", ge=1
    )
    data_parallel: int = operational(1, "Engines on this node, each with its own shards.", ge=1)
    drain: bool = operational(
        False, "Finish each shard before the next is begun: repeatable batches, less speed."
    )

    @pydantic.model_validator(mode="after")
    def _experts_lie_where_the_layers_do(self) -> Self:
        if self.expert_parallel_size > 1 and self.backend != "trtllm":
            raise ValueError(
                f"expert_parallel_size is for backend: trtllm alone, found backend: {self.backend}"
            )
        if self.tensor_parallel_size % self.expert_parallel_size:
            raise ValueError(
                f"expert_parallel_size must divide tensor_parallel_size, found "
                f"{self.expert_parallel_size} and {self.tensor_parallel_size}"
            )
        return self


class ParityConfig(DumpConfig):
    """Captures the same rows with two backends and compares them, layer by layer.

    In:  the recipe, and the rows that dump would take.
    Out: a table; exit 3 where a layer differs by more than --tolerance.
    """

    rows: int = operational(8, "Rows to compare.", ge=1)
    against: Literal["hf", "vllm"] = operational("hf", "The backend to compare with.")
    tolerance: float = operational(
        0.02, "Largest relative difference of a layer that is still called the same.", gt=0
    )
