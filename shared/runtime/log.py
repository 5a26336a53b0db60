# SPDX-License-Identifier: Apache-2.0
"""Logging: one format on stderr, and everything the process tree prints kept in the run's log file.

Engines print from processes of their own, past Python's logging. So the file descriptors 1 and 2
themselves are led through a pipe, and a thread copies it to the terminal and to the log file.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from shared.errors import EyrieError

FORMAT = "%(asctime)s %(levelname)s {stage} %(message)s"


def printable(text: str) -> str:
    r"""`text` on one line, without what could steer a terminal or forge a line.

    Worked example: ESC, "[31m", newline, "x" becomes r"\x1b[31m\nx".
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def format_error(error: EyrieError) -> str:
    """An error as a log record's message: three lines at most, each part on its own.

    Worked example:
        [target-layers] /models/x: expected 36 layers, found 32.
        remedy: Set run.target to the model that the recipe was made for.
        facts: {"expected": 36, "found": 32}
    """
    lines = [" ".join(f"[{error.code}] {error.problem}".splitlines())]
    if error.remedy:
        lines.append(" ".join(f"remedy: {error.remedy}".splitlines()))
    if error.facts:
        lines.append(f"facts: {json.dumps(error.facts, default=str)}")
    return "\n".join(lines)


class _Formatter(logging.Formatter):
    """Messages hold ids, file names and foreign words: only a record itself may begin a line."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n    ".join(map(printable, super().format(record).split("\n")))


def start_logging(stage: str) -> None:
    """Send this process's log records to stderr, in the one format."""
    logging.Formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(FORMAT.format(stage=stage), "%Y-%m-%dT%H:%M:%SZ"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("httpx", "httpx2", "httpcore", "openai", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _copy(source: int, terminal: int, log: int) -> None:
    while chunk := os.read(source, 1 << 16):
        for sink in (terminal, log):
            # A closed terminal or a full disk must not end the stage: the work goes on unlogged.
            with contextlib.suppress(OSError):
                os.write(sink, chunk)
    os.close(source)


@contextlib.contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Copy what this process and its children print to `path` too, for the length of the block.

    Where the folder cannot be written the stage still runs; its own write will name the fault.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        how = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        log = os.open(path, how, 0o644)
    except OSError as error:
        logging.getLogger(__name__).warning("no log file at %s: %s", path, error.strerror)
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    stdout, stderr = os.dup(1), os.dup(2)
    source, sink = os.pipe()
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    copier = threading.Thread(target=_copy, args=(source, stderr, log), daemon=True)
    copier.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        # A child that outlives the stage keeps the pipe open; do not wait for it.
        copier.join(timeout=2.0)
        os.close(stdout)


class Every:
    """True at most once in `period_s`: for progress lines and status files."""

    def __init__(self, period_s: float) -> None:
        self.period_s = period_s
        self._next = time.monotonic() + period_s

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self.period_s
        return True
