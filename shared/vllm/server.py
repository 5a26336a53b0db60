# SPDX-License-Identifier: Apache-2.0
"""vLLM's own OpenAI-compatible server as a child process on loopback.

In: its options by name. Out: an address, a key and whether it lives. Started as a module,
`python -m vllm.entrypoints.openai.api_server`, since the `vllm` command needs a distribution of that
very name; nothing here imports vLLM. The key is random, lives for this process, and goes in by the
environment, so that neither a log nor the process list shows it.
"""

import contextlib
import http.client
import json
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
from shared.runtime.process import die_with_parent, end_group, stop_if_requested

MODEL_NAME = "target"
_MODULE = "vllm.entrypoints.openai.api_server"
_GRACE_S = 20.0
_POLL_S = 0.2
_ACCELERATORS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",  # its own progress would drown the stage's
    "VLLM_NO_USAGE_STATS": "1",
}


def base_of(url: str) -> str:
    """A server's address without a slash or `/v1` at its end: people give it either way."""
    return url.rstrip("/").removesuffix("/v1")


def is_healthy(base_url: str) -> bool:
    """Whether a server answers /health."""
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException):
        return False


class ChildServer:
    """A server that this process started."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, api_key: str) -> None:
        self._process = process
        self.base_url = f"http://127.0.0.1:{port}"
        self.api_key = api_key

    def exit_code(self) -> int | None:
        """None while the process lives."""
        return self._process.poll()

    def is_healthy(self) -> bool:
        return self.exit_code() is None and is_healthy(self.base_url)

    def wait_until_ready(self, *, stage: str, timeout_s: float) -> None:
        """Return once /health answers.

        Raises:
            UserError: the process gave up by itself; its own words are in the log above.
            RetryableError: it was killed, or lives and did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_healthy():
            stop_if_requested("nothing was asked yet")
            code = self.exit_code()
            if code is not None and code < 0:
                raise RetryableError(
                    f"the vLLM server was ended by signal {-code} before it was ready.",
                    code="server-killed",
                    remedy="Signal 9 often means that memory ran out; else run it again.",
                    facts={"signal": -code},
                )
            if code is not None:
                raise UserError(
                    f"the vLLM server ended with code {code} before it was ready.",
                    code="server-refused",
                    remedy="The log above has the reason: usually a target or a head that this vLLM "
                    "does not support, too little memory for the longest row, or an unknown server "
                    "option.",
                )
            if time.monotonic() > deadline:
                raise RetryableError(
                    f"the vLLM server was not ready after {timeout_s:.0f} s.",
                    code="server-slow",
                    remedy=f"Raise {stage}.startup_timeout_s if the target is large.",
                )
            time.sleep(_POLL_S)


@contextlib.contextmanager
def start_server(
    options: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Iterator[ChildServer]:
    """A server for the length of the block, its workers ended after it; ready is another matter.

    Arguments:
        options: vLLM's own names (`max-model-len`); None and false are left out, true is a flag.
        environment: on top of this process's.
    """
    port, api_key = _free_port(), secrets.token_urlsafe(32)
    own: dict[str, Any] = {
        "served-model-name": MODEL_NAME,
        "host": "127.0.0.1",
        "port": port,
        "disable-uvicorn-access-log": True,
        # Compiling for a CPU takes longer than most runs there.
        "enforce-eager": not any(path.exists() for path in _ACCELERATORS),
    }
    defaults = dict(_ENVIRONMENT)
    if "kv-cache-memory-bytes" not in options:  # which the variable would overrule in silence
        defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"
    process = subprocess.Popen(
        [sys.executable, "-m", _MODULE, *_flags(own | dict(options))],
        env={**defaults, **os.environ, **(environment or {}), "VLLM_API_KEY": api_key},
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    try:
        yield ChildServer(process, port, api_key)
    finally:
        end_group(process, grace_s=_GRACE_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _flags(options: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not False and value is not None:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            flags += [f"--{name}", text]
    return flags
