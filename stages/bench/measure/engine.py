# SPDX-License-Identifier: Apache-2.0
"""Measures one engine configuration in a process of its own: the one bench file that imports vllm.

In: a plan (JSON): the target, how to draft (or not), the cells of the sweep, the warm-up texts and
the conversations. Out: the raw measurement (JSON): for each cell every answer's tokens, times and
draft counters, the wall time, and vLLM's speculative-decoding counters around it; or
`{"error": {"kind", "message"}}`. Costs one engine start, 3 to 20 s on a CPU, and the answers. The
surprise: no grouping by category. All prompts run as one closed loop, since a group per category
would drain the batch once per category and spoil the throughput; vLLM (0.30 or newer) counts per
request, at no cost. An older vLLM is measured category by category.

`python -m stages.bench.measure.engine PLAN.json OUT.json`
"""

import itertools
import os
import sys
import time
import traceback
from collections.abc import Generator, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt
from vllm import __version__ as VLLM_VERSION
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.reader import Counter, Vector
from vllm.v1.sample.rejection_sampler import MAX_SPEC_LEN

from shared.errors import EyrieError, RetryableError, UserError
from shared.io.files import read_json, write_json
from stages.bench.figures.metrics import Counters
from stages.bench.lossless import judge as lossless
from stages.bench.lossless.divergence import TOP, Probe, Scored
from stages.bench.measure import plans
from stages.bench.measure.cells import Cell, Conversation

MIN_TOKEN_BUDGET = 8192  # tokens per step; vLLM warns below it when it drafts
PREFIX = "vllm:spec_decode_"
SCALARS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
COUNTS_PER_REQUEST = "per_request_spec_decode_metrics" in EngineArgs.__dataclass_fields__

Question = tuple[list[int], SamplingParams]
Talk = Generator[Question, RequestOutput, None]


def check_plan(plan: dict[str, Any]) -> None:
    """Refuse what vLLM answers with a bare assertion or a traceback.

    Raises:
        UserError: no such engine option, or more draft tokens than vLLM verifies at once.
    """
    if unknown := plan["engine_args"].keys() - EngineArgs.__dataclass_fields__.keys():
        raise UserError(
            f"bench.engine_args: expected options of vLLM {VLLM_VERSION}, found {sorted(unknown)}."
        )
    depth = (plan["speculative"] or {}).get("num_speculative_tokens", 0)
    if depth > MAX_SPEC_LEN:
        raise UserError(
            f"bench.num_speculative_tokens: expected at most {MAX_SPEC_LEN}, what vLLM {VLLM_VERSION} "
            f"verifies at once, found {depth}."
        )


def build(plan: dict[str, Any]) -> LLM:
    """Start the engine. Equal for all drafters but for the drafting itself."""
    speculative = plan["speculative"]
    arguments: dict[str, Any] = {}
    if current_platform.is_cpu():
        # One process instead of three: a faster start, and an error keeps its cause.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # With an explicit size (GiB) and no compiling, vLLM skips its warm-up pass. The variable
        # would overrule the option in silence.
        if "kv_cache_memory_bytes" not in plan["engine_args"]:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        arguments["enforce_eager"] = True
    if speculative and COUNTS_PER_REQUEST:
        arguments["per_request_spec_decode_metrics"] = "summary"
    arguments |= {
        "model": plan["target"],
        "trust_remote_code": plan["trust_remote_code"],
        "dtype": plan["dtype"],
        "tensor_parallel_size": plan["tensor_parallel"],
        "max_model_len": plan["max_model_len"],
        "max_num_seqs": plan["max_num_seqs"],
        "max_num_batched_tokens": max(plan["max_model_len"], MIN_TOKEN_BUDGET),
        "enable_chunked_prefill": False,
        # A cached prefix would be computed once and then served free of charge to the next drafter.
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "seed": plan["seed"],
        "speculative_config": speculative,
    }
    return LLM(**(arguments | plan["engine_args"]))


def read_counters(llm: LLM) -> Counters | None:
    """What vLLM has counted since it started, over all its ranks; None where it does not draft."""
    if llm.llm_engine.has_unfinished_requests():
        raise RuntimeError("the counters were read while requests were running")
    metrics = llm.get_metrics()  # one of each name per data-parallel rank
    vectors = [m.values for m in metrics if isinstance(m, Vector) and m.name.startswith(PREFIX)]
    if not vectors:
        return None
    scalars = dict.fromkeys(SCALARS, 0)
    for metric in metrics:
        name = metric.name.removeprefix(PREFIX)
        if isinstance(metric, Counter) and name in scalars:
            scalars[name] += metric.value
    per_pos = tuple(map(sum, zip(*vectors, strict=True)))
    return Counters(**scalars, num_accepted_tokens_per_pos=per_pos)


def closed_loop(llm: LLM, talks: Iterable[Talk], concurrency: int) -> None:
    """Play the talks, `concurrency` at a time; the next begins when one has ended."""
    engine, waiting, numbers = llm.llm_engine, iter(talks), itertools.count()
    active: dict[str, Talk] = {}

    def ask(talk: Talk, question: Question) -> None:
        name = str(next(numbers))
        prompt = TokensPrompt(prompt_token_ids=question[0])
        engine.add_request(name, prompt, question[1])
        active[name] = talk

    for talk in itertools.islice(waiting, concurrency):
        ask(talk, next(talk))
    while active:
        for output in engine.step():
            if not output.finished:
                continue
            talk = active.pop(output.request_id)
            try:
                ask(talk, talk.send(output))
            except StopIteration:
                for following in itertools.islice(waiting, 1):
                    ask(following, next(following))


class Engine:
    """A running engine and what a plan asks of it."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.llm = build(plan)
        self.tokenizer = self.llm.get_tokenizer()

    def _sampling(self, cell: Cell, max_tokens: int) -> SamplingParams:
        return SamplingParams(
            temperature=cell.temperature,
            max_tokens=max_tokens,
            detokenize=False,  # ids are what we compare; text would cost every drafter the same
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _talk(
        self, conversation: Conversation, sampling: SamplingParams, rows: list[dict[str, Any]]
    ) -> Talk:
        messages: list[Any] = []
        for turn, step in enumerate(conversation.steps):
            messages += step
            ids = plans.prompt_ids(
                self.tokenizer, messages, conversation.tools, self.plan["chat_template_kwargs"]
            )
            self._check_room(conversation, len(ids), sampling.max_tokens or 0)
            output = yield ids, sampling
            rows.append(describe(conversation, turn, ids, output))
            text = self.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": text})

    def _check_room(self, conversation: Conversation, prompt_tokens: int, max_tokens: int) -> None:
        depth = (self.plan["speculative"] or {}).get("num_speculative_tokens", 0)
        limit = self.plan["max_model_len"]
        plans.check_room(conversation.id, prompt_tokens, max_tokens, depth, limit)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Warm up, then play every conversation between two readings of the counters."""
        conversations = [Conversation.from_json(raw) for raw in self.plan["conversations"]]
        warmup = [Conversation.from_json(raw) for raw in self.plan["warmup"]]
        self._play(warmup, cell, min(plans.WARMUP_TOKENS, cell.max_tokens))
        groups = plans.groups(conversations, one_loop=COUNTS_PER_REQUEST)
        return {"cell": asdict(cell), "segments": [self._segment(*group, cell) for group in groups]}

    def _segment(
        self, category: str | None, conversations: list[Conversation], cell: Cell
    ) -> dict[str, Any]:
        before = read_counters(self.llm)
        clock = time.perf_counter()
        rows = self._play(conversations, cell, cell.max_tokens)
        wall_s = time.perf_counter() - clock
        after = read_counters(self.llm)
        return {
            "category": category,
            "wall_s": wall_s,
            "counters_before": before and asdict(before),
            "counters_after": after and asdict(after),
            "requests": rows,
        }

    def _play(
        self, conversations: list[Conversation], cell: Cell, max_tokens: int
    ) -> list[dict[str, Any]]:
        sampling = self._sampling(cell, max_tokens)
        rows: list[list[dict[str, Any]]] = [[] for _ in conversations]
        talks = (
            self._talk(conversation, sampling, into)
            for conversation, into in zip(conversations, rows, strict=True)
        )
        closed_loop(self.llm, talks, cell.concurrency)
        return [row for talk in rows for row in talk]

    def score(self, probes: list[Probe], concurrency: int) -> list[Scored]:
        """The greedy tokens after each probe, with their best logprobs."""
        scored: dict[int, Scored] = {}

        def talk(index: int, probe: Probe) -> Talk:
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=probe.num_tokens,
                logprobs=TOP,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            output = yield probe.prompt_token_ids, sampling
            answer = output.outputs[0]
            best = [
                {token: entry.logprob for token, entry in step.items()} for step in answer.logprobs
            ]
            scored[index] = Scored(list(answer.token_ids), best)

        closed_loop(self.llm, (talk(i, probe) for i, probe in enumerate(probes)), concurrency)
        return [scored[index] for index in range(len(probes))]


def describe(
    conversation: Conversation, turn: int, prompt_token_ids: list[int], output: RequestOutput
) -> dict[str, Any]:
    """One answer's row. Times run from its admission to the batch: the queue is our own making."""
    answer, times = output.outputs[0], output.metrics
    drafted = getattr(answer, "spec_decode_metrics", None)
    if drafted:
        drafted = Counters.from_histogram(drafted.histogram, draft_tokens=drafted.num_draft_tokens)
    return {
        "id": conversation.id,
        "turn": turn,
        "category": conversation.category,
        "prompt_token_ids": prompt_token_ids,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "ttft_s": times.first_token_ts - times.scheduled_ts if times else None,
        "latency_s": times.last_token_ts - times.scheduled_ts if times else None,
        "counters": asdict(drafted) if drafted else None,
    }


def measure(plan: dict[str, Any]) -> dict[str, Any]:
    """Start and measure every cell; the plain engine is then asked about the divergences."""
    check_plan(plan)
    clock = time.perf_counter()
    engine = Engine(plan)
    start_s = time.perf_counter() - clock
    measured = [engine.measure(Cell(**cell)) for cell in plan["cells"]]
    raw = {"vllm_version": VLLM_VERSION, "start_s": start_s, "cells": measured}
    if plan["references"]:
        others = {name: read_json(Path(path)) for name, path in plan["references"].items()}
        raw["lossless"] = lossless.judged(raw, others, engine.score)
    return raw


def main(plan_path: Path, out_path: Path) -> int:
    """Measure, and write the raw measurement or the refusal. The unknown is a traceback."""
    try:
        write_json(out_path, measure(read_json(plan_path)))
        return 0
    except EyrieError as error:
        refusal = error
    except (ConnectionError, TimeoutError, EngineDeadError) as error:
        refusal = RetryableError(f"vLLM gave up: {error}")
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        # vLLM's and transformers' ways to refuse a model, a setting or the memory.
        offline = "couldn't connect" in str(error).lower()
        refusal = (RetryableError if offline else UserError)(f"vLLM refused: {error}")
    traceback.print_exception(refusal)
    kind = "retry" if isinstance(refusal, RetryableError) else "user"
    write_json(out_path, {"error": {"kind": kind, "message": str(refusal)}})
    return refusal.exit_code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
