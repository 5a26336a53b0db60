# SPDX-License-Identifier: Apache-2.0
"""Logging: one format on stderr, and everything the process tree prints kept in the run's log file.

Engines print from processes of their own, past Python's logging. So the file descriptors 1 and 2
themselves are led through a pipe. A thread copies all of it to the log file, and our own records to
the terminal: vLLM's warnings are kept, and shown only where an engine failed, or with
EYRIE_SHOW_ENGINE=1.
"""

import collections
import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from shared.errors import EyrieError
from shared.io.files import printable

FORMAT = "%(asctime)s %(levelname)s {stage} %(message)s"
SHOW_ENGINE = "EYRIE_SHOW_ENGINE"
# How a record of ours begins; each further line of it begins with four spaces.
_OURS = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (?P<level>[A-Z]+) [a-z]+ ")
_CONTINUED = b"    "
_OUR_LOGGERS = {"shared", "stages", "__main__", "root"}
# In the pipe, after whatever an engine began a line with: now show what was kept from the terminal; the
# block has ended.
_REPLAY, _END = b"\0replay\n", b"\0end\n"
_KEPT_LINES = 60  # an engine's two tracebacks
# A terminal that takes no more, and is not closed, holds the stage's end up for so long.
_DRAIN_S = 60.0


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
    """Messages hold ids, file names and foreign words: only a record itself may begin a line.

    A library's record begins with its logger's name, so that it does not pass for one of ours.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = "\n    ".join(map(printable, super().format(record).split("\n")))
        is_ours = record.name.partition(".")[0] in _OUR_LOGGERS
        return text if is_ours else f"[{record.name}] {text}"


def start_logging(stage: str) -> None:
    """Send this process's log records to stderr, in the one format."""
    logging.Formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(FORMAT.format(stage=stage), "%Y-%m-%dT%H:%M:%SZ"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("httpx", "httpx2", "httpcore", "openai", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for doubling in ("huggingface_hub", "datasets"):
        # As it is imported it adds a handler, which would print each of its records a second time.
        logging.getLogger(doubling).addHandler = lambda hdlr: None  # type: ignore[method-assign]


class _Copier:
    """What comes out of the pipe: all of it for the log, our own records for the terminal."""

    def __init__(self, source: int, terminal: int, log: int, is_quiet: bool) -> None:
        self._source, self._terminal, self._log = source, terminal, log
        self._is_quiet = is_quiet
        self._shows_all = os.environ.get(SHOW_ENGINE, "0") not in ("", "0")
        self._is_ours = False
        self._hidden: collections.deque[bytes] = collections.deque(maxlen=_KEPT_LINES)
        self.has_ended = threading.Event()  # all that came before the block's end is written

    def run(self) -> None:
        begun = b""
        while chunk := os.read(self._source, 1 << 16):
            lines = (begun + chunk).splitlines(keepends=True)
            # A bar that redraws itself ends its lines with a carriage return.
            begun = lines.pop() if not lines[-1].endswith((b"\n", b"\r")) else b""
            self._take(lines)
        self._take([begun] if begun else [])
        os.close(self._source)
        self.has_ended.set()

    def _take(self, lines: list[bytes]) -> None:
        kept: list[bytes] = []
        shown: list[bytes] = []
        has_ended = False
        for each in lines:
            line = each.removesuffix(_REPLAY).removesuffix(_END)
            kept.append(line)
            if self._shows_all or (line and self._belongs_to_us(line)):
                shown.append(line)
            elif line:
                self._hidden.append(line)
            if each.endswith(_REPLAY):
                shown += self._hidden
                self._hidden.clear()
            has_ended = has_ended or each.endswith(_END)
        _write(self._log, b"".join(kept))
        _write(self._terminal, b"".join(shown))
        if has_ended:
            self.has_ended.set()

    def _belongs_to_us(self, line: bytes) -> bool:
        if begun := _OURS.match(line):
            self._is_ours = not (self._is_quiet and begun["level"] == b"INFO")
        elif not line.startswith(_CONTINUED):
            self._is_ours = False
        return self._is_ours


def _write(sink: int, data: bytes) -> None:
    # A closed terminal or a full disk must not end the stage: the work goes on unlogged.
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(sink, data) :]


@contextlib.contextmanager
def logged_to(path: Path, *, is_quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Keep what this process and its children print in `path`, for the length of the block.

    The terminal gets our own records, and of a process that `is_quiet` only warnings and errors: another
    one reports the same work. Gives a function that shows the last of what the terminal did not get, for
    a stage whose engine failed.
    Where the folder cannot be written the stage still runs; its own write will name the fault.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        how = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        log = os.open(path, how, 0o644)
    except OSError as error:
        logging.getLogger(__name__).warning("no log file at %s: %s", path, error.strerror)
        yield lambda: None
        return
    _flush()
    stdout, stderr = os.dup(1), os.dup(2)
    source, sink = os.pipe()
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    copier = _Copier(source, stderr, log, is_quiet)
    threading.Thread(target=copier.run, daemon=True).start()

    def replay() -> None:
        _flush()
        _write(sink, _REPLAY)

    try:
        yield replay
    finally:
        _flush()
        # Not the pipe's own end: a child that outlives the stage keeps it open.
        _write(sink, _END)
        os.close(sink)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        copier.has_ended.wait(_DRAIN_S)
        os.close(stdout)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


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
