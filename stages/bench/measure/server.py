# SPDX-License-Identifier: Apache-2.0
"""A vLLM server of the stage's own, set up as the in-process engine is, for a served measurement."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from shared.errors import RetryableError
from shared.vllm.server import start_server
from stages.bench.measure.client import Server

_MIN_TOKEN_BUDGET = 8192  # as the in-process engine's


def options(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The server's options: what `engine.build` gives to the in-process engine."""
    speculative = plan["speculative"]
    values: dict[str, Any] = {
        "model": plan["target"],
        "trust-remote-code": plan["trust_remote_code"],
        "dtype": plan["dtype"],
        "tensor-parallel-size": plan["tensor_parallel"],
        "max-model-len": plan["max_model_len"],
        "max-num-seqs": plan["max_num_seqs"],
        "max-num-batched-tokens": max(plan["max_model_len"], _MIN_TOKEN_BUDGET),
        "no-enable-chunked-prefill": True,
        "no-enable-prefix-caching": True,
        "seed": plan["seed"],
    }
    if speculative:
        values["speculative-config"] = speculative
        values["per-request-spec-decode-metrics"] = "summary"
    return values | {name.replace("_", "-"): value for name, value in plan["engine_args"].items()}


@contextlib.contextmanager
def serve(
    plan: Mapping[str, Any], *, startup_timeout_s: float, request_timeout_s: float
) -> Iterator[Server]:
    """A ready server for the length of the block.

    Raises:
        UserError: the server refuses the plan.
        RetryableError: it died, in the block too, or took too long.
    """
    with start_server(options(plan)) as child:
        child.wait_until_ready(stage="bench", timeout_s=startup_timeout_s)
        try:
            yield Server(
                child.base_url,
                child.api_key,
                request_timeout_s=request_timeout_s,
                chat_template_kwargs=plan["chat_template_kwargs"],
            )
        except RetryableError as error:
            if (code := child.exit_code()) is not None:
                raise RetryableError(
                    f"the vLLM server died (code {code}) while it was measured. The log above "
                    "says why; run the same command again, or give it more memory."
                ) from error
            raise
