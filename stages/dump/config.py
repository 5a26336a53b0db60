# SPDX-License-Identifier: Apache-2.0
"""The section `dump` of a recipe."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import pydantic

from shared.artifacts.sharding import ShardedConfig
from shared.config import identity, operational
from shared.contracts.dtypes import Dtype
from shared.target.special_tokens import POLICY_DOC, Policy
from shared.vllm.own_options import field_name, refuse_own

# Set for each engine that `data_parallel` starts: how many of them share this node.
ENGINES_VARIABLE = "EYRIE_ENGINES_ON_NODE"
_FIXED = "dump itself, and cannot be changed"
# What dump sets itself, or what capturing depends on.
_OWN_ENGINE_ARGS = {
    "model": "run.target",
    "revision": "run.target_revision",
    "trust-remote-code": "run.trust_remote_code",
    "max-model-len": "run.max_length_tokens",
    "seed": "run.seed",
    "dtype": "dump.dtype",
    "tensor-parallel-size": "dump.tensor_parallel_size",
    "data-parallel-size": "dump.data_parallel",
    "max-num-batched-tokens": "dump.batch_tokens",
    "enable-prefix-caching": _FIXED,
    "speculative-config": _FIXED,
    "kv-transfer-config": _FIXED,
}
# Options of vLLM that change speed and memory, not what is computed: a finished dump stays valid.
_OPERATIONAL_ENGINE_ARGS = {
    "compilation_config",
    "cpu_offload_gb",
    "disable_custom_all_reduce",
    "distributed_executor_backend",
    "enable_expert_parallel",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "load_format",
    "max_num_seqs",
    "max_parallel_loading_workers",
    "pipeline_parallel_size",
}


class DumpConfig(ShardedConfig):
    """Runs the target over conversations and stores its hidden states, checked.

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
    groups: ClassVar[Mapping[str, str]] = {
        "Data": "conversations states special_token_text over_long",
        "Model": "backend dtype",
        "Speed": "batch_tokens tensor_parallel_size expert_parallel_size data_parallel num_shards "
        "shard_index engine_args writers drain",
        "Output": "layout state_dtype shard_bytes window_shards patience_s min_agreement max_logprob_gap "
        "max_failed_fraction",
    }

    conversations: str | None = identity(
        None,
        "Finished conversations to use instead of synth's: file, folder, glob (workspace first) or "
        "hub data set. Their token ids come from the target's chat template.",
    )
    states: str | None = identity(
        None,
        "Hidden states made elsewhere, to check and import instead of capturing: a folder of "
        "ModelOpt's or speculators' .pt, one file per conversation.",
    )
    special_token_text: Policy = identity("skip", f"For --conversations. {POLICY_DOC}")
    backend: Literal["vllm", "hf", "trtllm", "auto"] = identity(
        "vllm",
        "What captures. hf: targets whose vLLM model has no hooks. trtllm: needs TensorRT-LLM "
        "installed. auto: vllm if it has hooks for the target, else hf.",
    )
    layout: Literal["shards", "samples"] = identity(
        "shards",
        "shards: files of about shard_bytes. samples: one file per sample, as speculators 0.3 reads.",
    )
    state_dtype: Literal["bfloat16", "fp8"] = identity(
        "bfloat16",
        "How states are stored. fp8: the aux layers as e4m3 with one scale per token and layer, the "
        "final state as bfloat16; 62 % of the bytes with three aux layers.",
    )
    dtype: Dtype = identity(
        "auto",
        "What the target computes in; auto: its weights' dtype, or float32 on a CPU that is faster in it.",
    )
    over_long: Literal["truncate", "skip"] = identity(
        "truncate", "What to do with a row longer than run.max_length_tokens."
    )
    shard_bytes: int = identity(1 << 30, "Size at which a shard is closed, in bytes.", ge=1)

    window_shards: int | None = operational(
        None,
        "Most shards that lie on the disk at a time, those with held-out samples included, while "
        "train reads beside dump (train.follow). Default: all stay.",
        ge=2,
    )
    patience_s: float = operational(
        300.0,
        "With window_shards: seconds to wait for a train that is not at work; then exit 75.",
        gt=0,
    )
    min_agreement: float = operational(
        0.9,
        "Minimum share of greedy answer tokens that the stored states must predict, 0 to 1; below "
        "it: exit 3.",
        ge=0,
        le=1,
    )
    max_logprob_gap: float = operational(
        0.1,
        "Maximum mean difference, in nats, between the log-probabilities rebuilt from a probe row's "
        "stored states and the engine's own; above it: exit 3.",
        gt=0,
    )
    max_failed_fraction: float = operational(
        0.0, "Maximum share of rows that may fail, 0 to 1; above it: exit 3.", ge=0, le=1
    )
    batch_tokens: int = operational(8192, "Tokens that the engine computes in one step.", ge=1)
    tensor_parallel_size: int = operational(1, "GPUs that share one copy of the target.", ge=1)
    expert_parallel_size: int = operational(
        1, "With backend trtllm: GPUs of those that share the experts.", ge=1
    )
    data_parallel: int = operational(1, "Engines on this node, each with its own GPUs.", ge=1)
    engine_args: dict[str, Any] = operational(
        {},
        "More vLLM engine options by their own names, such as {gpu_memory_utilization: 0.8}. Those "
        "that change the states (quantization, kv_cache_dtype, ...) are part of the result's identity.",
    )
    writers: int = operational(
        2, "Threads that check and write full shards; each holds one shard in memory.", ge=1
    )
    drain: bool = operational(
        False, "Finish each shard before starting the next: repeatable batches, lower speed."
    )

    def identity(self) -> dict[str, Any]:
        """As every stage's, with the engine options that change the states.

        A window changes which samples share a shard; its size changes nothing.
        """
        keys = super().identity()
        if self.window_shards is not None:
            keys[f"{self.section}.window"] = True
        changing = {
            name: value
            for name, value in self.engine_args.items()
            if name not in _OPERATIONAL_ENGINE_ARGS
        }
        return keys | ({f"{self.section}.engine_args": changing} if changing else {})

    @property
    def engines_on_node(self) -> int:
        """Engines of this run that share this node's /dev/shm, this one included."""
        text = os.environ.get(ENGINES_VARIABLE, "")
        return int(text) if text.isdecimal() else 1

    @pydantic.model_validator(mode="after")
    def _backend_takes_its_settings(self) -> Self:
        if self.expert_parallel_size > 1 and self.backend != "trtllm":
            raise ValueError(
                "expert_parallel_size needs backend: trtllm (with vllm set engine_args: "
                f"{{enable_expert_parallel: true}}), found backend: {self.backend}"
            )
        if self.tensor_parallel_size % self.expert_parallel_size:
            raise ValueError(
                f"expert_parallel_size must divide tensor_parallel_size, found "
                f"{self.expert_parallel_size} and {self.tensor_parallel_size}"
            )
        if self.engine_args and (self.backend not in ("vllm", "auto") or self.states is not None):
            raise ValueError("engine_args needs backend: vllm or auto, and no states")
        if self.window_shards is not None:
            if self.layout != "shards":
                raise ValueError(f"window_shards needs layout: shards, found {self.layout}")
            if self.max_failed_fraction > 0:
                raise ValueError(
                    "window_shards needs max_failed_fraction: 0, since train plans its steps before "
                    f"any row can fail, found {self.max_failed_fraction}"
                )
        return self

    @pydantic.field_validator("engine_args")
    @classmethod
    def _options_are_free(cls, options: dict[str, Any]) -> dict[str, Any]:
        refuse_own(options, _OWN_ENGINE_ARGS)
        return {field_name(name): value for name, value in options.items()}


class ParityConfig(DumpConfig):
    """Captures the same rows with two backends and compares them, layer by layer.

    In:  the recipe, and the rows that dump would take.
    Out: a table; exit 3 if a layer differs by more than --tolerance.
    """

    groups: ClassVar[Mapping[str, str]] = {
        "Comparison": "rows against tolerance",
        "Data": "conversations special_token_text",
        "Model": "backend dtype",
        "Speed": "batch_tokens tensor_parallel_size expert_parallel_size engine_args",
    }
    lists_all: ClassVar[bool] = False

    rows: int = operational(8, "Rows to compare.", ge=1)
    against: Literal["hf", "vllm"] = operational("hf", "The backend to compare with.")
    tolerance: float = operational(
        0.02, "Maximum relative difference of a layer that still counts as the same.", gt=0
    )
