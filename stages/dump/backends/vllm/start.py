# SPDX-License-Identifier: Apache-2.0
"""An engine that did not start: will it start next time, or must something change first?"""

import contextlib
import multiprocessing
import re
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import vllm

from shared.errors import EyrieError, RetryableError, UserError

# How vLLM tells which of its processes failed to start: {'EngineCore_DP0': -9}.
_EXIT_CODES = re.compile(r"'[^']+': (-?\d+)")
_UNTOLD = "Failed core proc(s): {}"
_POLL_S, _REAP_S = 0.05, 5.0


@contextlib.contextmanager
def starting(target: str | Path) -> Iterator[None]:
    """A block that starts an engine.

    vLLM asks how its processes ended, sometimes before the kernel knows, and then says {}. So they are
    noted while they start, and asked again.

    Raises:
        UserError: the engine refuses the target or the machine.
        RetryableError: it was killed.
    """
    before = set(multiprocessing.active_children())
    seen: set[BaseProcess] = set()
    is_over = threading.Event()

    def note() -> None:
        # No longer than needed: whoever asks first has the exit code, and vLLM asks too.
        while not seen and not is_over.wait(_POLL_S):
            seen.update(set(multiprocessing.active_children()) - before)

    watcher = threading.Thread(target=note, daemon=True)
    watcher.start()
    try:
        yield
    except (RuntimeError, ValueError, RetryableError) as error:
        is_over.set()
        watcher.join()
        raise start_failure(error, target, _exit_codes(error, seen)) from error
    finally:
        is_over.set()
        watcher.join()


def _exit_codes(error: BaseException, seen: Iterable[BaseProcess]) -> list[int]:
    if _UNTOLD not in str(error):
        return [int(code) for code in _EXIT_CODES.findall(str(error))]
    for process in seen:
        process.join(_REAP_S)
    return [process.exitcode for process in seen if process.exitcode is not None]


def start_failure(
    error: BaseException, target: str | Path, exit_codes: Iterable[int]
) -> EyrieError:
    """What an engine that did not start means: try again, or change something first.

    A process that a signal ended (the machine's memory, a drained node) may start next time; one
    that left with an exception of its own will raise it again, and vLLM then ends the others.

    Worked example: exit code -9 alone is the former; 1, or 1 and -15, the latter.
    """
    codes = set(exit_codes)
    told = f"vLLM {vllm.__version__} could not start capturing {target}: {error} "
    if codes and max(codes) < 0:
        return RetryableError(
            f"{told}Its process was ended by a signal. If that was for want of memory, lower "
            "batch_tokens; else run the same command again."
        )
    return UserError(
        f"{told}The cause stands above this in the log. If memory is short, lower batch_tokens; if "
        "the model is not supported, set backend: hf."
    )
