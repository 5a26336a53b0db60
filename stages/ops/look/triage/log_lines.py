# SPDX-License-Identifier: Apache-2.0
"""Lines of a log of any size, and which of them look like an error or mark a stage's way.

In: a file of bytes. Out: blocks of whole lines, as bytes and as pyarrow's binary values over the
same memory. A line that never ends is cut, so that memory stays bounded.
"""

import dataclasses
import re
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path

import numpy as np
import pyarrow

CHUNK_BYTES = 8 << 20
_LONGEST_LINE = 8000

OWN = re.compile(
    r"\b(?P<level>DEBUG|INFO|WARNING|ERROR) (?P<stage>synth|dump|train|bench|ops) (?P<text>.*)"
)
CHAIN = re.compile(r"stage (synth|dump|train|bench)$")
DONE = re.compile(r"(already )?done: .*manifest\.json$")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
ERROR = re.compile(
    r"Traceback \(most recent call last\)"
    r"|(?:^|[\s|\]):])(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Timeout)(?::\s|\s*$)"
    r"|\b(?:ERROR|FATAL|CRITICAL|SEVERE)\b"
    r"|\b(?:Fatal Python error|Segmentation fault|Bus error|core dumped|terminate called|panic:)"
    r"|(?:^|\s)(?:fatal|error): "
    r"|^\W*(?:Killed|Aborted|Terminated)\s*$|: Killed\s*$"
)
NO_ERROR = re.compile(r"\b(?:DEBUG|INFO|WARNING|WARN)\b")
ERROR_TEXTS = (
    *("traceback", "error", "exception", "timeout", "fatal", "critical", "severe"),
    *("segmentation fault", "core dumped", "terminate called", "panic:"),
    *("killed", "aborted", "terminated"),
)
MARKER_TEXTS = (" ops stage ", " begin: process ", "done: ")


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a log, and where it is."""

    path: Path
    number: int
    offset: int  # of its first byte in the file
    text: str
    stage: str | None = None  # as the line itself or a line before it says
    is_final: bool = False  # a stage's own last words: an ERROR record of ours


def clean(line: bytes) -> str:
    """A line's text without colours, at most `_LONGEST_LINE` characters of it."""
    text = _ANSI.sub("", line.decode("utf-8", "replace")).rstrip()
    if len(text) > _LONGEST_LINE:
        half = _LONGEST_LINE // 2
        text = text[:half] + " ... " + text[-half:]
    return text


def chunks(log: RawIOBase) -> Iterator[tuple[int, int, bytes]]:
    """(number of the first line, its offset, whole lines), the last one ended if need be."""
    number, offset, rest = 1, 0, b""
    while block := log.read(CHUNK_BYTES):
        block = rest + block
        end = block.rfind(b"\n") + 1
        if end == 0 and len(block) < 2 * CHUNK_BYTES:
            rest = block
            continue
        # A line that never ends is cut: memory stays bounded, and its number stays right.
        taken = block[:end] if end else block
        yield number, offset, taken if end else taken + b"\n"
        number += taken.count(b"\n")
        offset += len(taken)
        rest = block[len(taken) :]
    if rest:
        yield number, offset, rest + b"\n"


def split(lines: bytes) -> "tuple[np.ndarray, pyarrow.Array]":
    """(offsets [N+1] of the lines, the lines as binary values), without a copy."""
    ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n")) + 1
    offsets = np.concatenate(([0], ends)).astype(np.int32)
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(lines)]
    return offsets, pyarrow.Array.from_buffers(pyarrow.binary(), len(ends), buffers)
