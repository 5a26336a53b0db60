# SPDX-License-Identifier: Apache-2.0
"""vLLM's own OpenAI-compatible server for the target, as a child process on loopback.

Started as a module, `python -m vllm.entrypoints.openai.api_server`, since the `vllm` command needs
a distribution of that very name. The key is random, lives for this process, and goes in by the
environment, so that neither a log nor the process list shows it.
"""

import contextlib
import http.client
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
from collections.abc import Iterator
from pathlib import Path

from shared.errors import RetryableError, UserError
from shared.process import die_with_parent, end_group, stop_if_requested
from stages.synth.client import Endpoint
from stages.synth.config import SynthConfig

MODEL_NAME = "target"
_GRACE_S = 20.0
_ACCELERATORS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))

logger = logging.getLogger(__name__)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _arguments(config: SynthConfig, target: Path, port: int) -> list[str]:
    arguments: dict[str, object] = {
        "model": target,
        "served-model-name": MODEL_NAME,
        "host": "127.0.0.1",
        "port": port,
        "dtype": config.dtype,
        "max-model-len": config.run.max_length_tokens,
        "max-num-seqs": config.concurrency,
        "tensor-parallel-size": config.tensor_parallel_size,
        "pipeline-parallel-size": config.pipeline_parallel_size,
        "reasoning-parser": config.reasoning_parser,
        "tool-call-parser": config.tool_call_parser,
        "enable-auto-tool-choice": config.tool_call_parser is not None,
        "seed": config.run.seed,
        # The recipe says how to sample; the target's generation_config.json must not.
        "generation-config": "vllm",
        "disable-uvicorn-access-log": True,
        "trust-remote-code": config.run.trust_remote_code,
        # Compiling for a CPU takes longer than most runs there.
        "enforce-eager": not any(path.exists() for path in _ACCELERATORS),
    }
    arguments |= config.server_args
    flags = []
    for name, value in arguments.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not False and value is not None:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            flags += [f"--{name}", text]
    return flags


def is_healthy(base_url: str) -> bool:
    """Whether a server answers /health."""
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException):
        return False


class Server:
    """A running server: where it is, its key, and whether it lives."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, api_key: str) -> None:
        self._process = process
        self.base_url = f"http://127.0.0.1:{port}"
        self.api_key = api_key

    def exit_code(self) -> int | None:
        """None while the process lives."""
        return self._process.poll()

    def healthy(self) -> bool:
        return is_healthy(self.base_url)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return once /health answers.

        Raises:
            UserError: the process ended by itself; its own words are in the log above.
            RetryableError: it lives but did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self.healthy():
            stop_if_requested("nothing was asked yet")
            code = self.exit_code()
            if code is not None:
                raise UserError(
                    f"the vLLM server ended with code {code} before it was ready. The log above "
                    "says why: usually a target that this vLLM does not support, too little memory "
                    "for run.max_length_tokens, or a server option it does not know."
                )
            if time.monotonic() > deadline:
                raise RetryableError(
                    f"the vLLM server was not ready after {timeout_s:.0f} s. Raise "
                    "synth.startup_timeout_s if the target is large."
                )
            time.sleep(0.2)

    def stop(self) -> None:
        """End the server and its workers."""
        end_group(self._process, grace_s=_GRACE_S)


@contextlib.contextmanager
def serve(config: SynthConfig, target: Path) -> Iterator[Endpoint]:
    """A ready server of our own for the length of the block."""
    port, api_key = _free_port(), secrets.token_urlsafe(32)
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",  # its own progress would drown the stage's
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        **config.server_env,
        "VLLM_API_KEY": api_key,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += _arguments(config, target, port)
    logger.info("starting the vLLM server for %s", target)
    started_s = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=die_with_parent
    )
    server = Server(process, port, api_key)
    try:
        server.wait_until_ready(config.startup_timeout_s)
        logger.info("the server is ready after %.0f s", time.monotonic() - started_s)
        yield Endpoint(
            base_url=server.base_url,
            model=MODEL_NAME,
            api_key=api_key,
            has_ended=lambda: server.exit_code() is not None,
            is_healthy=lambda: server.exit_code() is None and server.healthy(),
        )
    finally:
        server.stop()
