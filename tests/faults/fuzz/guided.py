# SPDX-License-Identifier: Apache-2.0
"""Fuzzing that is led by coverage: inputs that reach new lines of a reader breed the next ones.

    .venv/bin/pip install atheris==3.0.0       # not in the lock: it is for these runs alone
    python -m tests.faults.fuzz.guided --runs 5000 [--readers manifest,recipe]

In: a number of runs a reader. Out: a line a reader; the input of a failure goes to `corpus/<reader>/`.
Where `fuzz` damages what is whole, this finds its own way through the checks, byte by byte.
"""

import argparse
import logging
import multiprocessing
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["shared", "stages"]):
    from tests.faults.fuzz.readers import READERS
    from tests.faults.fuzz.run import CORPUS, fault_of, keep

_HANG_S = 10
_LARGEST_BYTES = 20_000
_MEMORY_MB = 8192


def search(name: str, runs: int) -> None:
    """One reader, in a process of its own: atheris ends it, with 0 where nothing was found."""
    reader = READERS[name]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        world, seeds = Path(folder) / "world", Path(folder) / "seeds"
        world.mkdir()
        seeds.mkdir()
        path = reader.make(world)
        (seeds / "whole").write_bytes(path.read_bytes())
        for kept in CORPUS.glob(f"{name.replace(' ', '_')}/*"):
            (seeds / kept.name).write_bytes(kept.read_bytes())
        logging.disable(logging.CRITICAL)

        def one(content: bytes) -> None:
            path.write_bytes(content)
            if fault := fault_of(reader, path):
                keep(name, path)
                raise RuntimeError(fault)

        limits = [
            f"-timeout={_HANG_S}",
            f"-max_len={_LARGEST_BYTES}",
            f"-rss_limit_mb={_MEMORY_MB}",
        ]
        atheris.Setup([sys.argv[0], f"-runs={runs}", *limits, str(seeds)], one)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--readers", default=",".join(READERS))
    given = parser.parse_args()
    bad = []
    for name in given.readers.split(","):
        process = multiprocessing.get_context("fork").Process(
            target=search, args=(name, given.runs)
        )
        process.start()
        process.join()
        bad += [name] if process.exitcode else []
        sys.stdout.write(
            f"{name:20} {given.runs:8} runs, {'BAD' if process.exitcode else 'none bad'}\n"
        )
        sys.stdout.flush()
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
