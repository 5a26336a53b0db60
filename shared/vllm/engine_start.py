# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine that did not start: try again, or change something first?

vLLM reports every failed start in the same words, "Engine core initialization failed", and adds how
its processes ended: {'EngineCore_DP0': -9}. A process that a signal ended (the machine ran out of
memory, the node is drained) may start next time. A process that left with an exception of its own
will raise it again; vLLM then ends the others with SIGTERM.
"""

import re
from collections.abc import Iterable

from shared.errors import EyrieError, RetryableError, UserError

_EXIT_CODES = re.compile(r"'[^']+': (-?\d+)")


def reported_exit_codes(text: str) -> list[int]:
    """The exit codes of engine processes that vLLM's message, or its log, names."""
    lines = [line for line in text.splitlines() if "Failed core proc(s)" in line]
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
