# SPDX-License-Identifier: Apache-2.0
"""The last attempt in a log: its first lines and its last 4 MiB, whatever the log's size.

A stage's log holds every attempt; each starts with a record `begin: process N`. What lies before the
last one is history. Costs one pass over the file, about a second for a gigabyte.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from shared.errors import UserError

HEAD_BYTES = 256 << 10
TAIL_BYTES = 4 << 20
_CHUNK_BYTES = 8 << 20
_MAX_LINE = 8000
_BEGIN_TEXT = b" begin: process "
_BEGIN = re.compile(rb"\bINFO (synth|dump|train|bench) begin: process \d+\s*$")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What is kept of a log.

    Attributes:
        lines: (line number in the file, its text without colours); a gap may lie between.
        stage: the stage that began it, where the log says so.
        count: how many attempts the log holds.
    """

    path: Path
    lines: list[tuple[int, str]]
    stage: str | None
    count: int
    num_lines: int
    num_bytes: int


def read_last_attempt(path: Path) -> Attempt:
    """The last attempt in a log, the only one where no `begin:` is in it.

    Raises:
        UserError: the file cannot be read.
    """
    start, first_number, stage, count, num_lines = 0, 1, None, 0, 0
    try:
        with path.open("rb") as log:
            for offset, number, block in _blocks(log):
                num_lines = number + block.count(b"\n") - (block.endswith(b"\n"))
                for position, begun in _begins(block):
                    start, stage, count = offset + position, begun, count + 1
                    first_number = number + block.count(b"\n", 0, position)
            size = log.tell()
            log.seek(start)
            kept = log.read(min(size - start, HEAD_BYTES + TAIL_BYTES))
            lines = _numbered(kept, first_number)
            if size - start > len(kept):
                lines = _numbered(kept[:HEAD_BYTES].rpartition(b"\n")[0], first_number)
                log.seek(size - TAIL_BYTES)
                tail = log.read().partition(b"\n")[2]
                lines += _numbered(tail, num_lines - tail.rstrip(b"\n").count(b"\n"))
    except OSError as error:
        raise UserError(
            f"could not read {path}: {error.strerror or error}.",
            code="log-unreadable",
            facts={"path": str(path)},
        ) from error
    return Attempt(path, lines, stage, count, num_lines, size)


def clean(line: bytes) -> str:
    """A line's text without colours, cut in the middle where it is very long."""
    text = _ANSI.sub("", line.decode("utf-8", "replace")).rstrip()
    half = _MAX_LINE // 2
    return text if len(text) <= _MAX_LINE else f"{text[:half]} ... {text[-half:]}"


def _blocks(log: "object") -> Iterator[tuple[int, int, bytes]]:
    """(offset, number of the first line, whole lines); a line that never ends is cut."""
    offset, number, rest = 0, 1, b""
    while chunk := log.read(_CHUNK_BYTES):  # type: ignore[attr-defined]
        block = rest + chunk
        end = block.rfind(b"\n") + 1 or (len(block) if len(block) > 2 * _CHUNK_BYTES else 0)
        whole, rest = block[:end], block[end:]
        if whole:
            yield offset, number, whole
            offset, number = offset + end, number + whole.count(b"\n")
    if rest:
        yield offset, number, rest


def _begins(block: bytes) -> Iterator[tuple[int, str]]:
    """(offset of the line, stage) of each attempt that begins in these lines."""
    position = block.find(_BEGIN_TEXT)
    while position >= 0:
        first = block.rfind(b"\n", 0, position) + 1
        end = block.find(b"\n", position)
        line = block[first : end if end >= 0 else len(block)]
        if len(line) < _MAX_LINE and (begun := _BEGIN.search(line)):
            yield first, begun[1].decode()
        position = block.find(_BEGIN_TEXT, position + 1)


def _numbered(text: bytes, first: int) -> list[tuple[int, str]]:
    """Lines with their numbers; a progress bar's rewrites of one line are lines of one number."""
    return [
        (number, clean(piece))
        for number, line in enumerate(text.removesuffix(b"\n").split(b"\n"), first)
        for piece in line.rstrip(b"\r").split(b"\r")
    ]
