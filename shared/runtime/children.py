# SPDX-License-Identifier: Apache-2.0
"""Processes that a stage starts and waits for: the first failure, or a stop, ends them all."""

import contextlib
import math
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence

from shared.errors import EXIT_DONE, EXIT_STOPPED
from shared.runtime.process import stop_requested

_POLL_S = 0.2

Children = Sequence["subprocess.Popen[bytes]"]


def wait_for_all(children: Children, *, grace_s: float = math.inf) -> dict[int, int]:
    """Wait for all; returns the ones that failed first: number -> exit code, -n for signal n.

    A failure, or a stop that was asked for, is passed on as SIGTERM; each saves and exits. Exit code
    143 counts as a failure too: somebody stopped that one alone.

    Args:
        grace_s: after a failure the others are killed in so many seconds; after a stop only if one
            of them failed otherwise, since those that save have no limit.
    """
    failed: dict[int, int] = {}
    ends_s = math.inf
    is_told = False
    while any(child.poll() is None for child in children):
        failed = failed or _failed(children)
        if (failed or stop_requested()) and not is_told:
            is_told = True
            send(children, signal.SIGTERM)
        saved = EXIT_STOPPED if stop_requested() else None
        if ends_s == math.inf and any(code != saved for code in _failed(children).values()):
            ends_s = time.monotonic() + grace_s
        if time.monotonic() > ends_s:
            send(children, signal.SIGKILL)
        time.sleep(_POLL_S)
    return failed or _failed(children)


def _failed(children: Children) -> dict[int, int]:
    codes = {number: child.poll() for number, child in enumerate(children)}
    return {n: code for n, code in codes.items() if code not in (None, EXIT_DONE)}


def send(children: Children, number: signal.Signals) -> None:
    """Send a signal to those that live."""
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A TCP port of this machine for a server that is to start, kept from others for the block.

    The socket that holds it does not listen. Servers bind with SO_REUSEADDR, and may then listen beside
    it on Linux; whoever asks for any free port, or connects from one, gets another.
    """
    with socket.socket() as holder:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            holder.setsockopt(socket.SOL_SOCKET, option, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])
