# SPDX-License-Identifier: Apache-2.0
"""The process of a stage: stop signals, locks on its folder, children that end with it."""

import atexit
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from shared.errors import RetryableError, Stopped, UserError
from shared.io.files import not_writable

_PR_SET_PDEATHSIG = 1
# Opened here: between fork and exec a child must not load a library, whose lock another thread may
# have held.
_LIBC = ctypes.CDLL(None)
_stop = threading.Event()
# What was saved, while a stop signal is to raise at once (`stopping_at_once`).
_at_once: list[str] = []
_RAISE_AGAIN_S = 2.0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Whether a library's threads may outlive the work, and the exit code if they do.
_is_outlived = False
_exit_code: int | None = None


def _ask_to_stop(_signal: int, _frame: FrameType | None) -> None:
    _stop.set()
    if _at_once:
        # A library may swallow it, as around an optional import: an alarm raises it again.
        signal.setitimer(signal.ITIMER_REAL, _RAISE_AGAIN_S)
        raise stopped(_at_once[-1])


def catch_stop_signals() -> None:
    """From now on SIGTERM and Ctrl-C set a flag that the stage's loops look at."""
    for number in (*_STOP_SIGNALS, signal.SIGALRM):
        signal.signal(number, _ask_to_stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


def hold_stop_signals() -> None:
    """For `Popen(preexec_fn=...)`: stop signals wait until the child calls `catch_stop_signals`.

    Without it they end a child that still imports, at once and without a word.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)


def stop_requested() -> bool:
    """Whether a signal asked this process to stop."""
    return _stop.is_set()


def stop_if_requested(saved: str) -> None:
    """Leave here if a stop was asked for; call it where everything finished is on disk.

    Raises:
        Stopped: with what was saved, for the log.
    """
    if _stop.is_set():
        raise stopped(saved)


@contextlib.contextmanager
def stopping_at_once(saved: str) -> Iterator[None]:
    """A block that a stop signal leaves at once: for library calls that take minutes.

    Only for calls that may be broken off at any line, such as loading a model or starting an engine.

    Raises:
        Stopped: a signal asked for it before or inside the block. A library that was broken off may
            have raised an error of its own, or have gone on without what it was importing.
    """
    try:
        _at_once.append(saved)  # a signal from here on leaves the block
        stop_if_requested(saved)
        yield
        stop_if_requested(saved)
    except Exception as error:
        if _stop.is_set() and not isinstance(error, Stopped):
            raise stopped(saved) from error
        raise
    finally:
        _at_once.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)


def expect_threads_to_outlive_the_work() -> None:
    """From now on `leave` ends this process without the interpreter's own end.

    For libraries whose threads take the GIL at any time, as gloo's do to drop a collective's tensors:
    before Python 3.14 such a thread aborts the process if the interpreter is about to end.
    """
    global _is_outlived
    _is_outlived = True


def leave(code: int) -> NoReturn:
    """End this process with an exit code; what was registered with `atexit` is called."""
    global _exit_code
    if _is_outlived:
        _exit_code = code
    sys.exit(code)


@atexit.register  # before any library's, as this module is imported early: so it is called after them
def _end_at_once() -> None:
    if _exit_code is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody reads it any more
                stream.flush()
        os._exit(_exit_code)


def stopped(saved: str) -> Stopped:
    """What to raise after a stop that somebody asked for, here or elsewhere."""
    return Stopped(
        f"stopped by a signal; {saved}.",
        code="stopped",
        remedy="Run the same command again to continue.",
    )


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie does not."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    # Gone, maybe between the two; or a number above every process's.
    except (ProcessLookupError, FileNotFoundError, OverflowError):
        return False
    except PermissionError:  # somebody else's, so alive
        return True
    return "\nState:\tZ" not in status


@dataclasses.dataclass(frozen=True)
class Share:
    """Which part of a stage's work is this process's: part `index` of `count`.

    Worked example, 7 shards and 3 processes: process 1 owns the shards 1 and 4.
    """

    index: int = 0
    count: int = 1

    def owns(self, item: int) -> bool:
        """Whether item `item` (a shard, a chunk) is this process's to make."""
        return item % self.count == self.index


@contextlib.contextmanager
def lock(path: Path, *, alone: bool = True, wait: bool = False) -> Iterator[int]:
    """Hold the lock file `path`, alone or together with others that do not ask to be alone.

    Yields:
        its descriptor.

    Raises:
        RetryableError: another live process holds it and `wait` is false; nothing was changed.
        UserError: the folder cannot be written, or its file system has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise not_writable(path.parent, error) from error
    try:
        _flock(descriptor, path, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, wait)
        yield descriptor
    finally:
        os.close(descriptor)


def _flock(descriptor: int, path: Path, mode: int, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, mode if wait else mode | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RetryableError(
            f"another process is working on {path.parent}; this one changed nothing.",
            code="artifact-locked",
            remedy="Wait for it, or stop it.",
            facts={"folder": str(path.parent)},
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        raise UserError(
            f"the file system of {path.parent} has no locks ({error.strerror}), so two processes "
            "could write one artifact.",
            code="no-file-locks",
            remedy="Mount it with locks (Lustre: -o flock), or use another workspace.",
        ) from error


def die_with_parent(how: signal.Signals = signal.SIGTERM) -> None:
    """For `Popen(preexec_fn=...)`: the kernel sends the child `how` when this process dies.

    A stage that is killed with SIGKILL cannot end its engine; without this it would live on and
    hold its memory. Linux's prctl(PR_SET_PDEATHSIG).
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, how)


def worker_dies_with_parent() -> None:
    """The same, called by a process that multiprocessing started, as engines start theirs.

    Does nothing in a process that was started otherwise: a stage may outlive the shell.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent.pid:  # it died before it was asked about
        os.kill(os.getpid(), signal.SIGKILL)


def end_group(process: "subprocess.Popen[bytes]", *, grace_s: float) -> None:
    """End a child that leads a process group: ask it alone, wait, then insist with its workers.

    Asking the workers too would end them under their leader, which then reports a crash.
    """
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
