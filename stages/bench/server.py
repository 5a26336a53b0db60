# SPDX-License-Identifier: Apache-2.0
"""vLLM's own OpenAI-compatible server as a child process on loopback, for a served measurement.

Started as a module, since the `vllm` command needs a distribution of that very name. Its key is
random, lives for this process, and goes in by the environment: neither a log nor the process list
shows it.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.errors import RetryableError, UserError
from shared.process import die_with_parent, end_group, stop_if_requested
from stages.bench.client import Server

_GRACE_S = 20.0
_ACCELERATORS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
_MIN_TOKEN_BUDGET = 8192  # as the in-process engine's

logger = logging.getLogger(__name__)


def arguments(plan: Mapping[str, Any], port: int) -> list[str]:
    """The server's flags: what `engine.build` gives to the in-process engine."""
    speculative = plan["speculative"]
    values: dict[str, Any] = {
        "model": plan["target"],
        "served-model-name": "target",
        "host": "127.0.0.1",
        "port": port,
        "trust-remote-code": plan["trust_remote_code"],
        "dtype": plan["dtype"],
        "tensor-parallel-size": plan["tensor_parallel"],
        "max-model-len": plan["max_model_len"],
        "max-num-seqs": plan["max_num_seqs"],
        "max-num-batched-tokens": max(plan["max_model_len"], _MIN_TOKEN_BUDGET),
        "no-enable-chunked-prefill": True,
        "no-enable-prefix-caching": True,
        "seed": plan["seed"],
        "disable-uvicorn-access-log": True,
        "enforce-eager": not any(path.exists() for path in _ACCELERATORS),
    }
    if speculative:
        values["speculative-config"] = speculative
        values["per-request-spec-decode-metrics"] = "summary"
    values |= {name.replace("_", "-"): value for name, value in plan["engine_args"].items()}
    flags = []
    for name, value in values.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not False and value is not None:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            flags += [f"--{name}", text]
    return flags


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        if _healthy(url):
            return
        stop_if_requested("a measurement is only kept whole")
        code = process.poll()
        if code is not None and code < 0:
            raise RetryableError(
                f"the vLLM server was ended by signal {-code} before it was ready."
            )
        if code is not None:
            raise UserError(
                f"the vLLM server ended with code {code} before it was ready. The log above says why: "
                "usually a head or a target that this vLLM does not support, too little memory, or an "
                "option in bench.engine_args that it does not know."
            )
        if time.monotonic() > deadline:
            raise RetryableError(
                f"the vLLM server was not ready after {timeout_s:.0f} s. Raise "
                "bench.startup_timeout_s if the target is large."
            )
        time.sleep(0.2)


@contextlib.contextmanager
def serve(
    plan: Mapping[str, Any], *, startup_timeout_s: float, request_timeout_s: float
) -> Iterator[Server]:
    """A ready server for the length of the block.

    Raises:
        UserError: the server refuses the plan.
        RetryableError: it died, in the block too, or took too long.
    """
    port, api_key = _free_port(), secrets.token_urlsafe(32)
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "VLLM_API_KEY": api_key,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments(plan, port)]
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=die_with_parent
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(process, url, startup_timeout_s)
        yield Server(url, api_key, request_timeout_s=request_timeout_s)
    except RetryableError as error:
        if (code := process.poll()) is not None:
            raise RetryableError(
                f"the vLLM server died (code {code}) while it was measured. The log above says why; "
                "run the same command again, or give it more memory."
            ) from error
        raise
    finally:
        end_group(process, grace_s=_GRACE_S)
