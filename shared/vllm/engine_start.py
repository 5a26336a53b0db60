# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine or server that did not start, or died: try again, or change something first?

vLLM reports every failed start in the same words, "Engine core initialization failed", and adds how
its processes ended: {'EngineCore_DP0': -9}. A process that a signal ended (the machine ran out of
memory, the node is drained) may start next time. A process that left with an exception of its own
will raise it again; vLLM then ends the others with SIGTERM.
"""

import re
from collections.abc import Iterable

from shared.errors import EyrieError, RetryableError, UserError

_EXIT_CODES = re.compile(r"'[^']+': (-?\d+)")
_FAILED = "Failed core proc(s)"
# What a process of vLLM's prints before it leaves with an exception of its own.
_OWN_WORDS = ("failed to start", "EngineCore encountered a fatal error")
_EXCEPTION = re.compile(r"(?:^|\s)((?:[\w.]+\.)?\w*(?:[Ee]rror|Exception)\b: .+)$", re.MULTILINE)
_WRAPPERS = ("Engine core initialization failed", "EngineCore encountered an issue")
_OUT_OF_MEMORY = ("OutOfMemoryError", "CUDA out of memory", "HIP out of memory")
_MAY_PASS = (
    "ddress already in use",
    "couldn't connect to",
    "Temporary failure in name resolution",
    "Max retries exceeded with url",
)


def reported_exit_codes(text: str) -> list[int]:
    """The exit codes of engine processes that vLLM's message, or its log, names."""
    lines = [line for line in text.splitlines() if _FAILED in line]
    return [int(code) for line in lines for code in _EXIT_CODES.findall(line)]


def was_killed(exit_codes: Iterable[int]) -> bool:
    """Whether signals alone ended the processes.

    Worked example: [-9] was killed; [1] and [1, -15] failed by themselves; [] says nothing.
    """
    codes = list(exit_codes)
    return bool(codes) and max(codes) < 0


def start_error(problem: str, exit_codes: Iterable[int], *, remedy: str) -> EyrieError:
    """The error for an engine that did not start.

    Args:
        problem: who could not start what, with vLLM's own message.
        exit_codes: how the engine's processes ended.
        remedy: what to change where the engine refused by itself.
    """
    codes = sorted(set(exit_codes))
    if was_killed(codes):
        return RetryableError(
            problem,
            code="engine-start-killed",
            remedy="A signal ended its process. If the machine ran out of memory, use less of it; "
            "otherwise run the same command again.",
            facts={"exit_codes": codes},
        )
    return UserError(
        problem, code="engine-start-refused", remedy=remedy, facts={"exit_codes": codes}
    )


def last_exception(text: str) -> str:
    """The last line that names an exception and is no wrapper around another; '' where none does."""
    lines = [line.strip() for line in _EXCEPTION.findall(text)]
    causes = [line for line in lines if not any(wrapper in line for wrapper in _WRAPPERS)]
    return causes[-1][:500] if causes else ""


def _cause(exit_code: int, text: str) -> str:
    """In a few words: the signal, or the exception, or at least the exit code."""
    if exit_code < 0:
        return f"signal {-exit_code}"
    return last_exception(text) or f"exit code {exit_code}"


def server_start_error(exit_code: int, text: str) -> EyrieError:
    """The error for vLLM's server that ended before it was ready.

    Args:
        exit_code: of the server; below 0 where a signal ended it.
        text: the last lines that it and its engine's processes printed.
    """
    codes = [exit_code] if exit_code < 0 else reported_exit_codes(text)
    if not codes and _FAILED in text and not any(words in text for words in _OWN_WORDS):
        codes = [-9]  # vLLM looked before the kernel knew, and the process left no words of its own
    problem = f"the vLLM server did not start ({_cause(exit_code, text)})."
    if not was_killed(codes) and any(words in text for words in _MAY_PASS):
        return RetryableError(
            problem,
            code="engine-start-transient",
            remedy="Run the same command again once the network or the port is there.",
        )
    return start_error(
        problem,
        codes or [exit_code],
        remedy="The log above has the reason: usually a target, head or option that this vLLM does not "
        "support, or too little memory. The same command will fail again.",
    )


def server_death(exit_code: int, text: str) -> EyrieError:
    """The error for vLLM's server that ended while it was in use."""
    problem = f"the vLLM server died in use ({_cause(exit_code, text)})."
    if exit_code >= 0 and any(words in text for words in _OUT_OF_MEMORY):
        return UserError(
            problem,
            code="engine-out-of-memory",
            remedy="Lower the load or the longest row, or give it more memory.",
            facts={"exit_code": exit_code},
        )
    return RetryableError(
        problem,
        code="engine-died",
        remedy="Run the same command again, or give it more memory.",
        facts={"exit_code": exit_code},
    )
