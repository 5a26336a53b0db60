# SPDX-License-Identifier: Apache-2.0
"""The section `synth` of a recipe."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from shared.artifacts.sharding import ShardedConfig
from shared.config import (
    SERVED_KEYS,
    SecretValueError,
    Section,
    identity,
    is_plain_url,
    operational,
)
from shared.contracts.dtypes import Dtype
from shared.prompts.sources import Source
from shared.target.special_tokens import POLICY_DOC, Policy
from shared.vllm.own_options import plain_name, refuse_own

# Server options that have a field of their own here, or that are ours alone to set.
_OWN_OPTIONS = {
    "model": "run.target",
    "revision": "run.target_revision",
    "max-model-len": "run.max_length_tokens",
    "seed": "run.seed",
    "chat-template": "run.chat_template",
    "trust-remote-code": "run.trust_remote_code",
    "dtype": "synth.dtype",
    "tensor-parallel-size": "synth.tensor_parallel_size",
    "pipeline-parallel-size": "synth.pipeline_parallel_size",
    "reasoning-parser": "synth.reasoning_parser",
    "tool-call-parser": "synth.tool_call_parser",
    "api-key": "the environment, which is the stage's own",
    "host": "nothing: the server listens on loopback",
    "port": "nothing: a free one is taken",
    "served-model-name": "nothing: only this stage asks the server",
    "config": "nothing: the file's options belong into the recipe",
}
# Server options that change what the target answers, and so belong to the fingerprint.
_CHANGE_ANSWERS = {
    "hf-overrides",
    "kv-cache-dtype",
    "load-format",
    "lora-modules",
    "quantization",
    "rope-scaling",
    "tokenizer",
}
_SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")


class SynthSource(Source):
    """A source among several."""

    weight: float | None = identity(
        None,
        "Share of prompts from here, relative to the other sources. With weights, the first source "
        "that has no more prompts ends the reading; without them everything is read.",
        gt=0,
    )
    max_samples: int | None = identity(None, "Read at most this many prompts from here.", ge=1)


class Sampling(Section):
    """One sampling setting of a mixture."""

    weight: float = identity(1.0, "Share of rows, relative to the others.", gt=0)
    temperature: float = identity(0.0, "Sampling temperature; 0 is greedy.", ge=0)
    top_p: float = identity(1.0, "Nucleus sampling.", gt=0, le=1)


class SynthConfig(ShardedConfig):
    """Answers prompts with the target and writes Parquet with the server's own token ids.

    In:  prompts: JSON, JSON lines, Parquet, a folder, a glob, or a hub data set.
    Out: <workspace>/<run>/synth/part-*.parquet, rejects*.jsonl, manifest.json.
    """

    section: ClassVar[str] = "synth"
    consumes: ClassVar[tuple[str, ...]] = SERVED_KEYS

    groups: ClassVar[Mapping[str, str]] = {
        "Data": "prompts sources mode max_samples shuffle shuffle_buffer_rows deduplicate",
        "Model and answers": "max_tokens temperature top_p sampling special_token_text dtype "
        "reasoning_end reasoning_parser tool_call_parser",
        "Speed": "endpoints concurrency tensor_parallel_size pipeline_parallel_size server_args "
        "server_env num_shards shard_index max_retries max_restarts request_timeout_s "
        "startup_timeout_s",
        "Output": "rows_per_part seconds_per_part max_failed_fraction",
    }

    prompts: str | None = identity(
        None, "One source of prompts: file, folder, glob or hub data set. Or give `sources`."
    )
    sources: tuple[SynthSource, ...] = identity(
        (),
        "Several sources, each with path, weight, max_samples, columns, split, subset, revision.",
    )
    mode: Literal["regenerate", "complete", "keep"] = identity(
        "regenerate",
        "regenerate: the target answers every turn; complete: it answers the last turn only; keep: "
        "take the rows' own answers, without a server.",
    )
    reasoning_end: str = identity("</think>", "What ends the reasoning in the target's answers.")
    max_samples: int | None = identity(None, "Read at most this many prompts in all.", ge=1)
    shuffle: bool = identity(False, "Shuffle each source with run.seed, through a buffer.")
    shuffle_buffer_rows: int = identity(10_000, "Rows that the shuffle buffer holds.", ge=1)
    deduplicate: bool = identity(True, "Skip rows whose content equals an earlier row's.")
    max_tokens: int = identity(
        1024, "Longest answer in tokens; run.max_length_tokens bounds prompt and answer.", ge=1
    )
    temperature: float = identity(0.0, "Sampling temperature; 0 is greedy.", ge=0)
    top_p: float = identity(1.0, "Nucleus sampling.", gt=0, le=1)
    sampling: tuple[Sampling, ...] = identity(
        (), "Sampling mixture of (weight, temperature, top_p); replaces temperature and top_p."
    )
    special_token_text: Policy = identity("skip", POLICY_DOC)
    dtype: Dtype = identity(
        "auto", "The server's dtype; auto: the weights', or float32 on a CPU that is faster in it."
    )
    reasoning_parser: str | None = identity(None, "vLLM's parser of this target's reasoning.")
    tool_call_parser: str | None = identity(None, "vLLM's parser of this target's tool calls.")

    endpoints: tuple[str, ...] = operational(
        (), "Running vLLM servers (http://host:port) to use instead of starting one."
    )
    concurrency: Annotated[int, pydantic.Field(ge=1)] | Literal["auto"] = operational(
        "auto",
        "Requests in flight; auto: by the memory of the smallest GPU, 512 from 70 GiB, 256 from 40 GiB, "
        "else 64; 64 for each of the endpoints.",
    )
    rows_per_part: int = operational(
        500, "Rows per Parquet part; a killed process loses at most these.", ge=1
    )
    seconds_per_part: float = operational(
        60.0, "Write a part at least this often, even if it has fewer rows.", gt=0
    )
    max_failed_fraction: float = operational(
        0.02, "Exit 3 if a larger fraction of the rows fails.", ge=0, le=1
    )
    max_retries: int = operational(
        5, "Attempts after the first, for a request that met a busy server or a timeout.", ge=0
    )
    max_restarts: int = operational(3, "Restarts of a server that died.", ge=0)
    request_timeout_s: float = operational(600.0, "Longest wait for one answer, in seconds.", gt=0)
    startup_timeout_s: float = operational(
        1800.0, "Longest wait for the server's start, in seconds.", gt=0
    )
    tensor_parallel_size: int = operational(1, "GPUs that split each layer of the target.", ge=1)
    pipeline_parallel_size: int = operational(
        1, "Groups of GPUs that hold consecutive layers of the target.", ge=1
    )
    server_args: dict[str, Any] = operational(
        {}, "Further options of vLLM's server, by their own names."
    )
    server_env: dict[str, str] = operational({}, "Environment variables of the server; no secrets.")

    @pydantic.field_validator("endpoints", mode="before")
    @classmethod
    def _addresses_hold_no_secret(cls, urls: object) -> object:
        for url in urls if isinstance(urls, list | tuple) else (urls,):
            if not (isinstance(url, str) and is_plain_url(url)):
                raise SecretValueError(
                    "expected http://host:port without credentials, which would stand in logs; a "
                    "key comes from $EYRIE_ENDPOINT_KEY"
                )
        return urls

    @pydantic.field_validator("server_args")
    @classmethod
    def _options_are_free(cls, options: dict[str, Any]) -> dict[str, Any]:
        refuse_own(options, _OWN_OPTIONS)
        return {plain_name(name): value for name, value in options.items()}

    @pydantic.field_validator("server_env")
    @classmethod
    def _no_secrets(cls, variables: dict[str, str]) -> dict[str, str]:
        for name in variables:
            if any(word in name.upper() for word in _SECRET_WORDS):
                raise SecretValueError(
                    f"{name} looks like a secret, and a recipe is copied into manifests: set it "
                    "in the stage's own environment, which the server inherits"
                )
        return variables

    @pydantic.model_validator(mode="after")
    def _one_way_each(self) -> "SynthConfig":
        if (self.prompts is None) == (not self.sources):
            raise ValueError("give either `prompts` or `sources`")
        names = [source.name for source in self.sources]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sources are named {doubled[0]}: rows could not be told apart")
        if self.sampling and (self.temperature != 0 or self.top_p != 1):
            raise ValueError("give either `sampling` or `temperature` and `top_p`")
        return self

    def identity(self) -> dict[str, Any]:
        keys = super().identity()
        for name in sorted(_CHANGE_ANSWERS & set(self.server_args)):
            keys[f"synth.server_args.{name}"] = self.server_args[name]
        return keys

    @property
    def all_sources(self) -> tuple[SynthSource, ...]:
        return self.sources or (SynthSource(path=str(self.prompts)),)

    @property
    def all_sampling(self) -> tuple[Sampling, ...]:
        return self.sampling or (Sampling(temperature=self.temperature, top_p=self.top_p),)

    @property
    def greedy(self) -> bool:
        """Whether every answer is the target's argmax."""
        return all(way.temperature == 0 for way in self.all_sampling)
