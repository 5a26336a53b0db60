# SPDX-License-Identifier: Apache-2.0
"""Damages files for every reader, a seed an execution, and reports what was not refused properly.

    python -m tests.faults.fuzz.run --executions 50000 [--readers manifest,recipe] [--seconds 600]

In: a number of executions a reader. Out: a line a reader, and in `corpus/<reader>/` the damaged file
of each new kind of failure, which the quick tests read from then on. Each reader runs in a process of
its own with bounded memory, so that a crash or a claimed terabyte is seen and told.
"""

import argparse
import collections
import contextlib
import hashlib
import logging
import multiprocessing
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from tests.faults.fuzz import mutate
from tests.faults.fuzz.reader import Reader
from tests.faults.fuzz.readers import READERS

CORPUS = Path(__file__).with_name("corpus")
LIMIT_S = 10
WAITING_TIMES = 30
MORE_MEMORY_BYTES = 4 << 30
_LARGEST_KEPT_BYTES = 20_000


class Hang(Exception):
    """A reader did not come back."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise in the block where it takes longer, of the processor or, much longer, of the clock.

    The processor's time, as a machine that is busy otherwise is no fault of the reader.
    """

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise Hang(f"not back after {seconds} s")

    before = {each: signal.signal(each, ring) for each in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(WAITING_TIMES * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for each, handler in before.items():
            signal.signal(each, handler)


def fault_of(reader: Reader, path: Path) -> str:
    """What is wrong with the reading of the damaged file at `path`; '' where it is as it should be."""
    try:
        with at_most(LIMIT_S):
            reader.read(path)
    except reader.refusals as refusal:
        named = path.name in str(refusal) or str(path.parent) in str(refusal)
        return "" if named or not reader.names_file else f"names no file: {refusal}"[:300]
    except Exception as error:  # noqa: BLE001 - which ones there are is what is asked
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/shared/" in f.filename or "/stages/" in f.filename]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "?"
        return f"{type(error).__name__} in {place}: {error}"[:300]
    return ""


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY_BYTES, -1))


def run(name: str, executions: int, seed: int, seconds: float) -> tuple[int, dict[str, int]]:
    """(executions, fault -> how often) of one reader."""
    reader = READERS[name]
    faults: collections.Counter[str] = collections.Counter()
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = reader.make(Path(folder))
        content = path.read_bytes()
        reader.read(path)  # whole, it must be taken
        _limit_memory()
        logging.disable(logging.CRITICAL)
        done = 0
        while done < executions and time.monotonic() < until:
            chance = random.Random(f"{name}/{seed + done}")
            mutate.damage(chance, path, content, reader.form)
            done += 1
            if fault := fault_of(reader, path):
                kind = re.sub(r"\d+|'.*|\".*|/dev/shm\S*", "_", fault)[:120]
                if kind not in faults:
                    sys.stderr.write(f"{name}: seed {seed + done - 1}: {fault}\n")
                    keep(name, path)
                faults[kind] += 1
        mutate.restore(path, content)
    return done, dict(faults)


def keep(name: str, path: Path) -> None:
    """Have the quick tests read this file from now on."""
    if path.is_file() and path.stat().st_size <= _LARGEST_KEPT_BYTES:
        folder = CORPUS / name.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        (folder / hashlib.sha256(content).hexdigest()[:12]).write_bytes(content)


def _child(name: str, executions: int, seed: int, seconds: float, answer: "object") -> None:
    answer.send(run(name, executions, seed, seconds))  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="most for each reader")
    parser.add_argument("--readers", default=",".join(READERS))
    given = parser.parse_args()
    total, bad = 0, 0
    for name in given.readers.split(","):
        ours, theirs = multiprocessing.Pipe()
        began = time.monotonic()
        arguments = (name, given.executions, given.seed, given.seconds, theirs)
        process = multiprocessing.get_context("fork").Process(target=_child, args=arguments)
        process.start()
        theirs.close()
        try:
            done, faults = ours.recv()
        except EOFError:
            process.join()
            done, faults = 0, {f"the process ended with code {process.exitcode}": 1}
        process.join()
        total, bad = total + done, bad + sum(faults.values())
        rate = done / (time.monotonic() - began)
        sys.stdout.write(
            f"{name:20} {done:8} executions {rate:7.0f}/s {sum(faults.values())} bad\n"
        )
        sys.stdout.flush()
    sys.stdout.write(f"{'all':20} {total:8} executions, {bad} bad\n")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
