# SPDX-License-Identifier: Apache-2.0
"""vLLM's own OpenAI-compatible server as a child process on loopback.

In: its options by name. Out: an address, a key and whether it lives. It is started as a module,
`python -m vllm.entrypoints.openai.api_server`, since the `vllm` command needs a distribution of that
very name; nothing here imports vLLM. The key is random, lives for this process, and is passed in the
environment, so that neither a log nor the process list shows it. What the server prints goes to this
process's stderr, and so to the stage's log; its last lines are kept to tell why it ended.
"""

import collections
import contextlib
import http.client
import json
import logging
import os
import secrets
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from shared.errors import EyrieError, RetryableError
from shared.runtime.children import held_port
from shared.runtime.gpus import listed_devices
from shared.runtime.process import die_with_parent, end_group, stop_if_requested
from shared.vllm import cpu, engine_start

MODEL_NAME = "target"
_MODULE = "vllm.entrypoints.openai.api_server"
_GRACE_S = 20.0
# While its engine loads, vLLM's server sits out a signal; there is nothing to finish or to lose yet.
_STARTING_GRACE_S = 1.0
_POLL_S = 0.2
_DEATH_S = 30.0  # from the engine's end to the server's own, which looks every five seconds
_KEPT_LINES = 400
# CUDA, ROCm, CUDA below WSL2.
_ACCELERATORS = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))
_CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"  # GiB
_RANKS = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",  # its own progress would drown the stage's
    "VLLM_NO_USAGE_STATS": "1",
}

logger = logging.getLogger(__name__)


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
        self._started_s = time.monotonic()
        self._was_ready = False
        self.base_url = f"http://127.0.0.1:{port}"
        self.api_key = api_key
        self._lines: collections.deque[bytes] = collections.deque(maxlen=_KEPT_LINES)
        self._copier = threading.Thread(target=self._copy, args=(process.stdout,), daemon=True)
        self._copier.start()

    def _copy(self, output: IO[bytes]) -> None:
        for line in output:
            self._lines.append(line)
            # A closed terminal or a full disk must not end the server.
            with contextlib.suppress(OSError):
                os.write(2, line)

    def last_words(self) -> str:
        """The last lines that the server and its own processes printed."""
        if self.exit_code() is not None:
            self._copier.join(timeout=2.0)
        return b"".join(list(self._lines)).decode(errors="replace")

    def exit_code(self) -> int | None:
        """None while the process lives."""
        return self._process.poll()

    def is_healthy(self) -> bool:
        return self.exit_code() is None and is_healthy(self.base_url)

    def death(self) -> EyrieError | None:
        """Why the server ended while it was in use; None where it lives on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=0 if self.is_healthy() else _DEATH_S)
            return engine_start.server_death(code, self.last_words())
        return None

    def wait_until_ready(self, *, stage: str, timeout_s: float) -> None:
        """Return once /health answers.

        Raises:
            UserError: the process gave up by itself.
            RetryableError: it was killed, or lives and did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_healthy():
            stop_if_requested("nothing was asked yet")
            if (code := self.exit_code()) is not None:
                raise engine_start.server_start_error(code, self.last_words())
            if time.monotonic() > deadline:
                raise RetryableError(
                    f"the vLLM server was not ready after {timeout_s:.0f} s.",
                    code="engine-start-timeout",
                    remedy=f"Raise {stage}.startup_timeout_s if the target is large.",
                    facts={"timeout_s": timeout_s},
                )
            time.sleep(_POLL_S)
        self._was_ready = True
        logger.info("the server is ready after %.0f s", time.monotonic() - self._started_s)

    def end(self) -> None:
        """Ask the server to end, then end it and its own processes."""
        end_group(self._process, grace_s=_GRACE_S if self._was_ready else _STARTING_GRACE_S)


@contextlib.contextmanager
def start_server(
    options: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Iterator[ChildServer]:
    """A server for the length of the block; its own processes are ended after it.

    Args:
        options: vLLM's own names (`max-model-len`); None is left out.
        environment: on top of this process's.
    """
    logger.info(
        "starting the vLLM server for %s: usually about a minute; a large target takes longer",
        options.get("model"),
    )
    api_key = secrets.token_urlsafe(32)
    inherited = {**_ENVIRONMENT, _CPU_CACHE: "1", **os.environ}
    if "kv-cache-memory-bytes" in options:  # the variable would overrule the option in silence
        inherited.pop(_CPU_CACHE)
    variables = {**inherited, **(environment or {}), "VLLM_API_KEY": api_key}
    is_cpu = not _has_accelerator(variables)
    own: dict[str, Any] = {
        "served-model-name": MODEL_NAME,
        "host": "127.0.0.1",
        "disable-uvicorn-access-log": True,
        # Compiling for a CPU takes longer than most runs there.
        "enforce-eager": is_cpu or None,
    }
    if is_cpu and cpu.starts_in_one_process(map(options.get, _RANKS), variables):
        own["distributed-executor-backend"] = cpu.ONE_PROCESS_EXECUTOR
        # As vLLM does it: a core for the server itself. Small steps take half as long again without.
        variables.setdefault("OMP_NUM_THREADS", str(max(1, cpu.num_cpus() - 1)))
    with held_port() as port:  # the server takes it many seconds later
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, *flags(own | {"port": port} | dict(options))],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        server = ChildServer(process, port, api_key)
        try:
            yield server
        finally:
            server.end()


def _has_accelerator(environment: Mapping[str, str]) -> bool:
    """Whether a server with these variables finds one: CUDA_VISIBLE_DEVICES= hides them all."""
    is_hidden = listed_devices(environment) == []
    return not is_hidden and any(path.exists() for path in _ACCELERATORS)


def flags(options: Mapping[str, Any]) -> list[str]:
    """The words of a command line for options by vLLM's own names, as vLLM's parser takes them.

    Worked example: {"enforce-eager": True, "async-scheduling": False, "seed": None, "device-ids": [0, 1]}
    become `--enforce-eager --no-async-scheduling --device-ids 0 1`.
    """
    words: list[str] = []
    for name, value in options.items():
        if value is True or value is False:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            each = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(_word, each)]
    return words


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
