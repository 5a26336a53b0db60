# SPDX-License-Identifier: Apache-2.0
"""Starting a vLLM engine inside this process's program, and judging why it did not start."""

import contextlib
import multiprocessing
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import vllm

from shared.errors import RetryableError
from shared.runtime.process import stop_if_requested
from shared.vllm.engine_start import reported_exit_codes, start_error

_POLL_S, _REAP_S = 0.05, 5.0


@contextlib.contextmanager
def starting(target: str | Path) -> Iterator[None]:
    """A block that starts an engine.

    vLLM asks how its processes ended, sometimes before the kernel knows, and then reports {}. So
    the processes are noted while they start, and asked again.

    Raises:
        UserError: the engine refuses the target or the machine.
        RetryableError: the engine was killed.
        Stopped: a signal asked for it; vLLM may have reported it as a failed start.
    """
    before = set(multiprocessing.active_children())
    started: set[BaseProcess] = set()
    is_over = threading.Event()

    def note() -> None:
        # No longer than needed: whoever asks first gets the exit code, and vLLM asks too.
        while not started and not is_over.wait(_POLL_S):
            started.update(set(multiprocessing.active_children()) - before)

    watcher = threading.Thread(target=note, daemon=True)
    watcher.start()
    try:
        yield
    except (RuntimeError, ValueError, RetryableError) as error:
        is_over.set()
        watcher.join()
        stop_if_requested("every whole shard is saved")
        raise start_error(
            f"vLLM {vllm.__version__} could not start capturing {target}: {error}",
            reported_exit_codes(str(error)) or _own_exit_codes(started),
            remedy="The cause is above this line in the log. If memory is short, lower "
            "dump.batch_tokens or set dump.engine_args: {gpu_memory_utilization: ...}; if vLLM does "
            "not support the model, set backend: hf.",
        ) from error
    finally:
        is_over.set()
        watcher.join()


def _own_exit_codes(processes: set[BaseProcess]) -> list[int]:
    for process in processes:
        process.join(_REAP_S)
    return [process.exitcode for process in processes if process.exitcode is not None]
