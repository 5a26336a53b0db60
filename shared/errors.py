# SPDX-License-Identifier: Apache-2.0
"""The exit codes, and the one exception for each.

    0    done, or already done
    1    a bug: a traceback, ours to mend
    2    user, recipe, input-artifact or capacity error: a re-run unchanged fails again
    3    the stage's own output failed its checks
    75   try again: network, engine died
    143  stopped by SIGTERM after a clean save

Compose, Kubernetes' podFailurePolicy, ops and the tests all read these.

An error has four parts. Programs read `code` and `facts`; people read `problem` and `remedy`, whose
words may change at any time:

    raise UserError(
        f"{target}: expected {wanted} layers, found {found}.",
        code="target-layers",
        remedy="Set run.target to the model that the recipe was made for.",
        facts={"target": str(target), "expected": wanted, "found": found},
    )
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_OUTPUT = 3
EXIT_RETRY = 75
EXIT_STOPPED = 143

# What foreign code (a parser, a model's class, a chat template) raises for input that it does not expect.
FOREIGN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class EyrieError(Exception):
    """An expected failure: it ends the process with `exit_code` and one message, no traceback.

    Attributes:
        problem: what was expected, what was found, and where.
        code: stable name of this kind of failure, in kebab case; unique among all kinds.
        remedy: what to do next; empty where the problem says it all.
        facts: JSON values that the problem is about (paths, counts, names); never a secret.
    """

    exit_code = EXIT_BUG
    kind = "bug"

    def __init__(
        self,
        problem: str,
        *,
        code: str = "",
        remedy: str = "",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(f"{problem} {remedy}".rstrip())
        self.problem = problem
        self.code = code
        self.remedy = remedy
        self.facts = dict(facts or {})

    def as_dict(self) -> dict[str, Any]:
        """The four parts, as the status file holds them."""
        return {
            "code": self.code,
            "problem": self.problem,
            "remedy": self.remedy,
            "facts": self.facts,
        }


class UserError(EyrieError):
    """A flag, a recipe, an input artifact or the machine's capacity is wrong."""

    exit_code = EXIT_USER
    kind = "user error"


class OutputError(EyrieError):
    """The stage ran, and what it made failed its own checks."""

    exit_code = EXIT_OUTPUT
    kind = "output failed its checks"


class RetryableError(EyrieError):
    """Nothing here is known to be wrong: the same command may work in a while."""

    exit_code = EXIT_RETRY
    kind = "try again"


class Stopped(EyrieError):
    """SIGTERM or Ctrl-C arrived; what was finished is saved and the next run continues from it."""

    exit_code = EXIT_STOPPED
    kind = "stopped"


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a wrong name: the closest valid one, else all of them."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else f"Valid: {', '.join(names)}."
