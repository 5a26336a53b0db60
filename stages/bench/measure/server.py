# SPDX-License-Identifier: Apache-2.0
"""A vLLM server of the stage's own for the length of one measurement."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shared.errors import RetryableError
from shared.target.model import read_config
from shared.target.precision import compute_dtype
from shared.target.templates import template_file
from shared.vllm.http import Address
from shared.vllm.server import start_server
from stages.bench.config import BenchConfig
from stages.bench.measure.plans import Plan, Speculative

_MIN_TOKEN_BUDGET = 8192  # tokens per step; vLLM warns below it when it drafts


def target_options(config: BenchConfig, target: Path) -> dict[str, Any]:
    """What a server must be told of the target, to measure it and to serve it afterwards."""
    template = (config.paths.root / "chat_template.jinja").absolute()
    return {
        "trust-remote-code": config.run.trust_remote_code or None,
        "dtype": compute_dtype(config.dtype, read_config(target)),
        "chat-template": template_file(target, config.run, config.workspace, template),
    }


def options(plan: Plan, speculative: Speculative) -> dict[str, Any]:
    """The server's options: equal for all drafters except for the drafting itself."""
    config, target = plan.config, plan.target
    if target is None:
        raise ValueError("existing servers are measured: none is to be started")
    values: dict[str, Any] = {
        "model": target,
        **target_options(config, target),
        "tensor-parallel-size": config.tensor_parallel_size,
        "max-model-len": plan.max_model_len,
        "max-num-seqs": plan.max_num_seqs,
        "max-num-batched-tokens": max(plan.max_model_len, _MIN_TOKEN_BUDGET),
        "enable-chunked-prefill": False,
        # A cached prefix would be computed once and then served free of charge to the next drafter.
        "enable-prefix-caching": False,
        "seed": config.run.seed,
    }
    if speculative:
        values["speculative-config"] = speculative
        values["per-request-spec-decode-metrics"] = "summary"
    return values | config.engine_options


@contextlib.contextmanager
def serve(
    plan: Plan, speculative: Speculative, *, while_starting: Callable[[], None] | None = None
) -> Iterator[Address]:
    """The address of a ready server for the length of the block.

    Args:
        while_starting: runs beside the start, which takes one core most of its time. What it raises
            ends the server.

    Raises:
        UserError: the server refuses the plan, or runs out of memory.
        RetryableError: it died, in the block too, or took too long to start.
    """
    config: BenchConfig = plan.config
    with start_server(options(plan, speculative)) as child:
        if while_starting is not None:
            while_starting()
        child.wait_until_ready(stage="bench", timeout_s=config.startup_timeout_s)
        try:
            yield Address(child.base_url, child.api_key)
        except RetryableError as error:
            if death := child.death():
                raise death from error
            raise
