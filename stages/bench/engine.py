# SPDX-License-Identifier: Apache-2.0
"""Measures one engine configuration in a process of its own: the one bench file that imports vllm.

In: a plan (JSON): the target, how to draft (or not), the warm-up prompts and the measured ones.
Out: a report (JSON): every request's tokens, times and draft counters, the wall time, and vLLM's
speculative-decoding counters around the measurement; or `{"error": {"kind", "message"}}`. Costs one
engine start, about 10 s on a CPU, and the answers. The surprise: no grouping by category. All
prompts run as one closed loop of `max_num_seqs`, since a group per category would drain the batch
once per category and spoil the throughput; vLLM (0.30 or newer) counts per request, at no cost.

`python -m stages.bench.engine PLAN.json OUT.json`
"""

import os
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt
from vllm import __version__ as VLLM_VERSION
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.reader import Counter, Vector

from shared.errors import EyrieError, RetryableError, UserError
from shared.files import read_json, write_json
from stages.bench.metrics import Counters, needed_model_len

WARMUP_TOKENS = 16  # enough for several drafts and verifications, and for a CUDA graph's first use
MIN_TOKEN_BUDGET = 8192  # tokens per step; vLLM warns below it when it drafts
PREFIX = "vllm:spec_decode_"
SCALARS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


def check_plan(plan: dict[str, Any]) -> None:
    """Refuse what vLLM would measure wrongly in silence.

    Raises:
        UserError: a warm-up prompt is measured too, max_model_len cuts the last drafts short, or
            vLLM has no such engine option.
    """
    if unknown := plan["engine_args"].keys() - EngineArgs.__dataclass_fields__.keys():
        raise UserError(
            f"bench.engine_args: expected options of vLLM {VLLM_VERSION}, found {sorted(unknown)}."
        )
    measured = {tuple(prompt["prompt_token_ids"]) for prompt in plan["prompts"]}
    if not measured or measured & {tuple(ids) for ids in plan["warmup"]}:
        raise UserError(
            f"bench: expected prompts to measure that are not in the warm-up, found {len(measured)} "
            f"distinct ones and a warm-up of {len(plan['warmup'])}. Give it more prompts."
        )
    depth = (plan["speculative"] or {}).get("num_speculative_tokens", 0)
    longest, answer, limit = max(map(len, measured)), plan["max_tokens"], plan["max_model_len"]
    needed = needed_model_len(longest, max_tokens=answer, num_speculative_tokens=depth)
    if limit < needed:
        raise UserError(
            f"bench: expected max_model_len >= {needed} (longest prompt {longest} + max_tokens "
            f"{answer} + 3 x {depth} drafted), found {limit}; nearer the limit vLLM drafts zeros "
            "and counts them. Raise it, lower max_tokens or drop the longest prompts."
        )


def check_head(plan: dict[str, Any]) -> None:
    """Refuse a head that is not this target's or not whole.

    vLLM serves a head without `norm.weight` or `d2t` with a made-up one, at an acceptance near 0,
    and answers a wrong shape with a bare assertion.

    Raises:
        UserError: the head is missing, or its sizes, aux layers or tensors do not fit.
    """
    folder = Path(plan["speculative"]["model"])
    head = read_json(folder / "config.json")
    target = AutoConfig.from_pretrained(
        plan["target"], revision=plan["revision"], trust_remote_code=plan["trust_remote_code"]
    ).get_text_config()
    hidden, drafts = head["hidden_size"], head.get("draft_vocab_size", head["vocab_size"])
    found = (head["vocab_size"], head.get("target_hidden_size", hidden))
    expected = (target.vocab_size, target.hidden_size)
    if found != expected:
        raise UserError(
            f"{folder}/config.json: expected a head for {plan['target']} (vocabulary, hidden size: "
            f"{expected}), found one for another target {found}. Bench it with its own."
        )
    layers = head.get("eagle_aux_hidden_state_layer_ids") or []
    if not layers or max(layers) > target.num_hidden_layers:
        raise UserError(
            f"{folder}/config.json: expected eagle_aux_hidden_state_layer_ids within the target's "
            f"{target.num_hidden_layers} layers, found {layers}. Export the head again."
        )
    shapes = {"fc.weight": [hidden, len(layers) * target.hidden_size], "norm.weight": [hidden]}
    if drafts < target.vocab_size:
        shapes |= {"lm_head.weight": [drafts, hidden], "d2t": [drafts]}
    path = folder / "model.safetensors"
    try:
        with safe_open(path, "pt") as weights:
            names = shapes.keys() & set(weights.keys())
            there = {name: weights.get_slice(name).get_shape() for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable ({error}). Export the head again.") from error
    if there != shapes:
        raise UserError(f"{path}: expected {shapes}, found {there}. Export the head again.")


def build(plan: dict[str, Any]) -> LLM:
    """Start the engine. Equal for all drafters but for the drafting itself."""
    speculative = plan["speculative"]
    arguments: dict[str, Any] = {}
    if current_platform.is_cpu():
        # One process instead of three: a faster start, and an error keeps its cause.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # With an explicit size (GiB) and no compiling, vLLM skips its warm-up pass.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        arguments["enforce_eager"] = True
    if speculative and "per_request_spec_decode_metrics" in EngineArgs.__dataclass_fields__:
        arguments["per_request_spec_decode_metrics"] = "summary"
    arguments |= {
        "model": plan["target"],
        "revision": plan["revision"],
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


def describe(prompt: dict[str, Any], output: RequestOutput) -> dict[str, Any]:
    """One request's row. Times run from its admission to the batch: the queue is our own making."""
    answer, times = output.outputs[0], output.metrics
    drafted = getattr(answer, "spec_decode_metrics", None)
    if drafted:
        drafted = Counters.from_histogram(drafted.histogram, draft_tokens=drafted.num_draft_tokens)
    return {
        "id": prompt["id"],
        "category": prompt["category"],
        "prompt_tokens": len(prompt["prompt_token_ids"]),
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "ttft_s": times.first_token_ts - times.scheduled_ts if times else None,
        "latency_s": times.last_token_ts - times.scheduled_ts if times else None,
        "counters": asdict(drafted) if drafted else None,
    }


def measure(plan: dict[str, Any]) -> dict[str, Any]:
    """Start, warm up, measure. See the module docstring for the report."""
    check_plan(plan)
    if plan["speculative"] and plan["speculative"]["method"] == "eagle3":
        check_head(plan)
    clock = time.perf_counter()
    llm = build(plan)
    start_s = time.perf_counter() - clock

    def answer(prompts: list[list[int]], max_tokens: int) -> list[RequestOutput]:
        sampling = SamplingParams(
            temperature=plan["temperature"],
            max_tokens=max_tokens,
            ignore_eos=plan["ignore_eos"],
            detokenize=False,  # ids are what we compare; text would cost every drafter the same
        )
        tokens = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        return llm.generate(tokens, sampling, use_tqdm=False)

    answer(plan["warmup"], min(WARMUP_TOKENS, plan["max_tokens"]))
    before = read_counters(llm)
    clock = time.perf_counter()
    outputs = answer([prompt["prompt_token_ids"] for prompt in plan["prompts"]], plan["max_tokens"])
    wall_s = time.perf_counter() - clock
    after = read_counters(llm)
    return {
        "vllm_version": VLLM_VERSION,
        "start_s": start_s,
        "wall_s": wall_s,
        "requests": [describe(*pair) for pair in zip(plan["prompts"], outputs, strict=True)],
        "counters_before": before and asdict(before),
        "counters_after": after and asdict(after),
    }


def main(plan_path: Path, out_path: Path) -> int:
    """Measure, and write the report or the refusal. What it does not recognise is a traceback."""
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
