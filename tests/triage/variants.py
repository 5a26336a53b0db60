# SPDX-License-Identifier: Apache-2.0
"""Other logs of the same failure: cut, moved to other paths and times, mixed with other ranks' lines.

Seeded, and never a change to what a line means: the words that name the failure stay.
"""

import random
import re
from collections.abc import Callable

_CHATTER = (
    "INFO 11-20 03:12:{s:02d} [loggers.py:259] Engine 000: Avg prompt throughput: {n}.0 tokens/s",
    "Loading safetensors checkpoint shards:  {s}% Completed | {s}/100 [00:0{d}<00:09, 7.36it/s]",
    "[rank{d}]: step {n} loss=2.{s:02d} accuracy=0.4{d}/0.3{d} tokens_per_s=44{s:02d}",
    "2026-11-20 03:12:{s:02d},{n} - transformers - WARNING - using {d} workers",
    "error rate 0.0{d} over {n} requests, 0 errors",
)
_LAST_LINES = 200


def _chatter(rng: random.Random) -> str:
    line = rng.choice(_CHATTER)
    return line.format(s=rng.randrange(60), n=rng.randrange(10_000), d=rng.randrange(10))


def truncated(log: str, rng: random.Random) -> str:
    """A long run before it, of which the last 200 lines are left; and no line of a begin."""
    before = [_chatter(rng) for _ in range(_LAST_LINES)]
    return "\n".join([*before, *log.splitlines()][-_LAST_LINES:]) + "\n"


def moved(log: str, rng: random.Random) -> str:
    """Other dates, process ids and folders, and Windows line ends."""
    log = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "2031-02-03T04:05:06Z", log)
    log = re.sub(r"pid=\d+", lambda _: f"pid={rng.randrange(9, 99999)}", log)
    log = re.sub(r"\b\d\d-\d\d \d\d:\d\d:\d\d\b", "02-03 04:05:06", log)
    other = f"/mnt/vol-{rng.randrange(99)}/some user/"
    log = log.replace("/workspace/", other.replace(" ", "_")).replace("/models/", "/lustre/m/")
    return log.replace("\n", "\r\n")


def interleaved(log: str, rng: random.Random) -> str:
    """Other nodes' lines between its own, and the node before each."""
    lines = []
    for line in log.splitlines():
        lines += [f"node1-0  | {_chatter(rng)}" for _ in range(rng.choice((0, 0, 1, 3)))]
        lines.append(f"node0-0  | {line}")
    return "\n".join(lines) + "\n"


def coloured(log: str, rng: random.Random) -> str:
    """As a terminal got it: colours, and a progress bar that rewrites its line."""
    lines = []
    for line in log.splitlines():
        bar = "".join(f"\r{_chatter(rng)}" for _ in range(rng.choice((0, 0, 2))))
        lines.append(f"{bar}\r\x1b[31m{line}\x1b[0m" if bar else f"\x1b[1;36m{line}\x1b[0m")
    return "\n".join(lines) + "\n"


def collected(log: str, _rng: random.Random) -> str:
    """As a container runtime keeps it."""
    return "".join(f"2031-02-03T04:05:06.789Z stderr F {line}\n" for line in log.splitlines())


VARIANTS: dict[str, Callable[[str, random.Random], str]] = {
    "truncated": truncated,
    "moved": moved,
    "interleaved": interleaved,
    "coloured": coloured,
    "collected": collected,
}
