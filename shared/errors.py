# SPDX-License-Identifier: Apache-2.0
"""The exit codes, and the one exception for each.

    0    done, or already done
    1    a bug: a traceback, ours to mend
    2    user, recipe, input-artifact or capacity error: a re-run unchanged fails again
    3    the stage's own output failed its checks
    75   try again: network, engine died
    143  stopped by SIGTERM after a clean save

Compose, Kubernetes' podFailurePolicy, ops and the tests all read these. A message says what was
expected, what was found, in which file, and what to do next.
"""

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_OUTPUT = 3
EXIT_RETRY = 75
EXIT_STOPPED = 143


class EyrieError(Exception):
    """An expected failure: it ends the process with `exit_code` and one message, no traceback."""

    exit_code = EXIT_BUG
    kind = "bug"


class UserError(EyrieError):
    """A flag, a recipe, an input artifact or the machine's capacity is wrong."""

    exit_code = EXIT_USER
    kind = "user error"


class OutputError(EyrieError):
    """The stage ran, and what it made failed its own checks."""

    exit_code = EXIT_OUTPUT
    kind = "output failed its checks"


class RetryableError(EyrieError):
    """Nothing here is wrong as far as can be told: the same command may work in a while."""

    exit_code = EXIT_RETRY
    kind = "try again"


class Stopped(EyrieError):
    """SIGTERM or Ctrl-C arrived; what was finished is saved and the next run continues from it."""

    exit_code = EXIT_STOPPED
    kind = "stopped"
