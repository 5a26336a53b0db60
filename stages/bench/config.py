# SPDX-License-Identifier: Apache-2.0
"""The section `bench` of a recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic

from shared.config import (
    SERVED_KEYS,
    CommandConfig,
    SecretValueError,
    StageConfig,
    identity,
    is_plain_url,
    operational,
)
from shared.contracts.dtypes import Dtype
from shared.prompts.sources import Source
from shared.vllm.own_options import field_name, plain_name, refuse_own

Counts = tuple[Annotated[int, pydantic.Field(ge=1)], ...]
Temperatures = tuple[Annotated[float, pydantic.Field(ge=0)], ...]

_HEAD = "the head's own config.json"
_VLLM = "vLLM itself"
_OWN_METHOD = ("method", "eagle3")  # that it is said again changes nothing
# What the report says of the measurement, and so no option may replace.
_OWN_SPECULATIVE_ARGS = {
    "model": "bench.head",
    "method": "bench itself, which measures EAGLE-3 heads",
    "revision": "bench.head_revision",
    "num-speculative-tokens": "bench.num_speculative_tokens",
    "num-speculative-tokens-per-batch-size": "bench.num_speculative_tokens, for every batch",
    "parallel-drafting": _HEAD,
    "max-model-len": "bench itself: nearer the limit vLLM drafts zeros",
    "target-model-config": _VLLM,
    "target-parallel-config": _VLLM,
    "draft-model-config": _VLLM,
    "draft-parallel-config": _VLLM,
}
_OWN_ENGINE_ARGS = {
    "model": "run.target",
    "model-weights": "run.target",
    "revision": "run.target_revision",
    "trust-remote-code": "run.trust_remote_code",
    "dtype": "bench.dtype",
    "tensor-parallel-size": "bench.tensor_parallel_size",
    "max-model-len": "bench itself, from the longest row: nearer the limit vLLM drafts zeros",
    "config": "nothing: the file's options belong into the recipe",
    "served-model-name": "bench itself, which alone asks the server",
    "speculative-config": "bench.head, bench.num_speculative_tokens and bench.speculative_args",
}


class BenchConfig(StageConfig):
    """Measures the draft head in vLLM: the same prompts without it and with it.

    In:  <workspace>/<run>/export/ (or --head) and prompts that no training has seen.
    Out: <workspace>/<run>/bench/report.json and report.html; exit 3 where a gate is missed.
    num_speculative_tokens, concurrency, temperature and max_tokens may each be a list: every
    combination is measured, and the gates judge the first value of each.
    """

    section: ClassVar[str] = "bench"
    consumes: ClassVar[tuple[str, ...]] = SERVED_KEYS
    groups: ClassVar[Mapping[str, str]] = {
        "Data": "prompts max_prompts max_tokens temperature",
        "Model": "head head_revision dtype num_speculative_tokens speculative_args compare_baseline "
        "compare_ngram",
        "Engine": "endpoint baseline_endpoint concurrency tensor_parallel_size engine_args "
        "startup_timeout_s request_timeout_s",
        "Gates": "min_acceptance_length min_gain_over_ngram min_speedup earlier_report "
        "max_regression max_wrong_answers",
    }

    prompts: Source | None = identity(
        None,
        "Held-out prompts: a file, folder, glob or hub data set; default: 40 that come with bench.",
    )
    max_prompts: int | None = identity(
        None, "Number of prompts to measure, from the first on; default: all.", ge=1
    )
    head: str | None = identity(
        None, "Another EAGLE-3 head than the run's export: a folder or a hub id."
    )
    head_revision: str | None = identity(None, "Hub revision of bench.head.")
    endpoint: str | None = identity(
        None,
        "A running vLLM server with the head, http://host:8000; its key: $EYRIE_ENDPOINT_KEY.",
    )
    baseline_endpoint: str | None = identity(
        None, "The same target served without the head; its key: $EYRIE_BASELINE_ENDPOINT_KEY."
    )
    num_speculative_tokens: Counts = identity(
        (3,), "Draft length K in tokens; one or a list.", min_length=1
    )
    concurrency: Counts = identity((1,), "Requests in flight; one or a list.", min_length=1)
    temperature: Temperatures = identity(
        (0.0,), "Sampling temperature; one or a list; 0 is greedy.", min_length=1
    )
    max_tokens: Counts = identity((256,), "Longest answer in tokens; one or a list.", min_length=1)
    dtype: Dtype = identity(
        "auto",
        "dtype of the engine; auto: the weights', or float32 on a CPU that is faster in it.",
    )
    compare_baseline: bool = identity(
        True,
        "Also measure the target without the head; false: no speed-up, and no answers compared.",
    )
    compare_ngram: bool = identity(False, "Also measure vLLM's ngram proposer at the same K.")
    speculative_args: dict[str, Any] = identity(
        {}, "Further keys of vLLM's speculative_config, for the head's engine only."
    )

    min_acceptance_length: float = identity(
        2.1,
        "Gate: required acceptance length; a lower one is exit 3. If it is not given and the first K is "
        "1: 0.",
        ge=0,
    )
    min_gain_over_ngram: float | None = identity(
        None, "Gate: required gain in tokens per step over the ngram proposer; needs compare_ngram."
    )
    min_speedup: float | None = identity(
        None, "Gate: required speed-up; off by default, since drafting costs more on a tiny target."
    )
    earlier_report: str | None = identity(None, "Gate: a report.json to compare this run with.")
    max_regression: float = identity(
        0.05, "Gate: allowed loss against the earlier report (0.05 is 5 %).", ge=0, le=1
    )
    max_wrong_answers: int | None = identity(
        0, "Gate: allowed greedy answers that differ from the baseline's without a tie; null: any."
    )

    # Operational in other stages, but here the engine itself is what is measured.
    tensor_parallel_size: int = identity(1, "Number of GPUs that share the target's layers.", ge=1)
    engine_args: dict[str, Any] = identity(
        {}, "Further vLLM engine options by their own names, as {max_num_batched_tokens: 16384}."
    )
    startup_timeout_s: float = operational(
        1800.0, "Longest wait for a server's start, in seconds.", gt=0
    )
    request_timeout_s: float = operational(600.0, "Longest wait for one answer, in seconds.", gt=0)

    @pydantic.field_validator("prompts", mode="before")
    @classmethod
    def _a_path_is_a_source(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @pydantic.field_validator("speculative_args", "engine_args")
    @classmethod
    def _options_are_free(
        cls, options: dict[str, Any], info: pydantic.ValidationInfo
    ) -> dict[str, Any]:
        is_head = info.field_name == "speculative_args"
        changing = [each for each, value in options.items() if (each, value) != _OWN_METHOD]
        refuse_own(changing, _OWN_SPECULATIVE_ARGS if is_head else _OWN_ENGINE_ARGS)
        return {field_name(name): value for name, value in options.items()}

    @pydantic.field_validator("endpoint", "baseline_endpoint", mode="before")
    @classmethod
    def _address_holds_no_secret(cls, url: object, info: pydantic.ValidationInfo) -> object:
        if url is not None and not (isinstance(url, str) and is_plain_url(url)):
            raise SecretValueError(
                "expected http://host:port without credentials, which would stand in logs and in the "
                f"report; a key comes from $EYRIE_{str(info.field_name).upper()}_KEY"
            )
        return url

    @pydantic.field_validator(
        "num_speculative_tokens", "concurrency", "temperature", "max_tokens", mode="before"
    )
    @classmethod
    def _one_or_a_list(cls, value: object) -> object:
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if len(set(map(repr, values))) != len(values):
            raise ValueError("the values of a sweep must differ")
        return values

    @pydantic.field_validator("max_tokens")
    @classmethod
    def _an_answer_has_drafts(cls, lengths: Counts) -> Counts:
        if min(lengths) < 2:
            raise ValueError(
                "expected 2 or more: the first token comes without a draft, so that an answer of one "
                "measures nothing"
            )
        return lengths

    @pydantic.model_validator(mode="after")
    def _one_way_to_the_engine(self) -> "BenchConfig":
        if self.baseline_endpoint and not self.endpoint:
            raise ValueError("baseline_endpoint needs an endpoint with the head")
        if self.endpoint and (self.head or self.compare_ngram or self.speculative_args):
            raise ValueError(
                "an endpoint serves its own head: leave out head, compare_ngram and "
                "speculative_args"
            )
        if self.endpoint and len(self.num_speculative_tokens) > 1:
            raise ValueError("an endpoint has one draft length; give num_speculative_tokens once")
        if self.min_speedup is not None and self.endpoint and not self.baseline_endpoint:
            raise ValueError("min_speedup needs a baseline; give baseline_endpoint")
        if self.min_speedup is not None and not self.compare_baseline:
            raise ValueError("min_speedup needs compare_baseline")
        if self.baseline_endpoint and not self.compare_baseline:
            raise ValueError("leave baseline_endpoint out, or compare_baseline true")
        if self.min_gain_over_ngram is not None and not self.compare_ngram:
            raise ValueError("min_gain_over_ngram needs compare_ngram")
        return self

    @pydantic.model_validator(mode="after")
    def _a_head_can_meet_the_gates(self) -> "BenchConfig":
        depth = self.num_speculative_tokens[0]
        if "min_acceptance_length" not in self.model_fields_set:
            if self.min_acceptance_length > depth + 1:
                object.__setattr__(self, "min_acceptance_length", 0.0)  # the config is frozen
        elif self.min_acceptance_length > depth + 1:
            raise ValueError(
                f"min_acceptance_length: expected at most {depth + 1}, all that a step with "
                f"num_speculative_tokens: {depth} can give, found {self.min_acceptance_length:g}"
            )
        if (gain := self.min_gain_over_ngram) is not None and gain > depth:
            raise ValueError(
                f"min_gain_over_ngram: expected at most {depth}, since a step with "
                f"num_speculative_tokens: {depth} gives {depth + 1} tokens at most and ngram's one at "
                f"least, found {gain:g}"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _the_batch_holds_the_load(self) -> "BenchConfig":
        limit, wanted = self.engine_args.get("max_num_seqs"), max(self.concurrency)
        engines = self.engine_args.get("data_parallel_size", 1)  # the limit is each one's
        if self.endpoint or not (str(limit).isdecimal() and str(engines).isdecimal()):
            return self  # none, or vLLM refuses it
        if (held := int(str(limit)) * int(str(engines))) < wanted:
            raise ValueError(
                f"engine_args: max_num_seqs {limit} holds fewer requests than concurrency {wanted} has "
                f"in flight; the others would wait, at a load of {held}: raise max_num_seqs or leave "
                "it out, or lower concurrency"
            )
        return self

    @property
    def engine_options(self) -> dict[str, Any]:
        """`engine_args` by the names of vLLM's flags."""
        return {plain_name(name): value for name, value in self.engine_args.items()}

    @property
    def measured_through(self) -> str:
        """`served`: by vLLM's own server, started here; `endpoint`: by a server that runs."""
        return "endpoint" if self.endpoint else "served"


class CompareConfig(CommandConfig):
    """Compares two finished benches side by side: a table here, and a page with figures.

    Each is a run's name in the workspace, a bench folder or a report.json.
    """

    positional: ClassVar[tuple[str, ...]] = ("first", "second")

    first: str = pydantic.Field(
        description="The earlier run: a name, a bench folder or a report.json."
    )
    second: str = pydantic.Field(description="The later run.")
    out: Path = pydantic.Field(Path("compare.html"), description="Path of the page to write.")
