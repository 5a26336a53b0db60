# SPDX-License-Identifier: Apache-2.0
"""Does train beside dump take longer than the slower of the two?   python -m tests.perf.window WORKSPACE

In: the workspace of a finished demo, which is only read. Out: the seconds of `ops run` for dump alone
on one core, for train alone on another, and for both at once on the two, with a window of shards; the
same epochs and shard size everywhere. Each has its process's start in it. What two busy cores cost each
other is measured too: train's time while dumps of another run work on the first core. The last line is
JSON.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "compose" / "recipes" / "demo" / "recipe.yaml"
SHARD_BYTES = 6_000_000  # the demo's states fill some 26 of them


class Bed:
    """A folder with two runs of the demo's conversations, `alone` and `together`.

    Args:
        workspace: of a finished demo.
    """

    def __init__(self, folder: Path, workspace: Path) -> None:
        self.folder = folder
        (folder / "targets").symlink_to((workspace / "targets").resolve())
        synth = (workspace / "demo" / "synth").resolve()
        for run in ("alone", "beside", "together"):
            (folder / run).mkdir()
            (folder / run / "synth").symlink_to(synth)

    def begin(
        self, run: str, recipe: dict[str, Any], stages: str, cores: Collection[int], *flags: str
    ) -> "subprocess.Popen[bytes]":
        """`ops run` of these stages, which sees no other cores."""
        path = self.folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump({**recipe, "run": {**recipe["run"], "name": run}}))
        command = [sys.executable, "-m", "stages.ops", "run", "--recipe", str(path), *flags]
        return subprocess.Popen(
            [*command, "--workspace", str(self.folder), "--only", stages],
            cwd=ROOT,
            stdout=sys.stderr,
            preexec_fn=functools.partial(os.sched_setaffinity, 0, cores),
        )


def seconds(begin: Callable[[], "subprocess.Popen[bytes]"]) -> float:
    """The time until the process has ended."""
    started_s = time.perf_counter()
    process = begin()
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return round(time.perf_counter() - started_s, 1)


@contextlib.contextmanager
def again_and_again(begin: Callable[[], "subprocess.Popen[bytes]"]) -> Iterator[None]:
    """A block beside which the process runs, and is started anew each time it ends."""
    ends = threading.Event()

    def work() -> None:
        while not ends.is_set():
            process = begin()
            while process.poll() is None and not ends.wait(0.1):
                pass
            process.terminate()
            process.wait()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        yield
        ends.set()
        working.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--backend", default="vllm", choices=["vllm", "hf"])
    parser.add_argument("--window_shards", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=1)
    given = parser.parse_args()
    first, second, *_ = sorted(os.sched_getaffinity(0))
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text())
    recipe["dump"] = {"backend": given.backend, "shard_bytes": SHARD_BYTES}
    recipe["train"] |= {"epochs": given.epochs, "plateau_fraction": None}
    window = {"window_shards": given.window_shards}
    followed = recipe | {
        "dump": recipe["dump"] | window,
        "train": recipe["train"] | {"follow": True},
    }
    told: dict[str, Any] = {"backend": given.backend, "epochs": given.epochs, **window}
    with tempfile.TemporaryDirectory() as name:
        bed = Bed(Path(name), given.workspace)
        dump = functools.partial(bed.begin, "alone", recipe, "dump", [first])
        train = functools.partial(bed.begin, "alone", recipe, "train", [second])
        other = functools.partial(bed.begin, "beside", recipe, "dump", [first], "--overwrite")
        told["dump_s"], told["train_s"] = seconds(dump), seconds(train)
        told["shards"] = len(list((bed.folder / "alone" / "dump").glob("shard_*.pt")))
        with again_and_again(other):
            told["train_beside_other_dumps_s"] = seconds(lambda: train("--overwrite"))
        both = functools.partial(bed.begin, "together", followed, "dump,train", [first, second])
        told["together_s"] = seconds(both)
    slower = max(told["dump_s"], told["train_s"])
    told["ratio"] = round(told["together_s"] / slower, 2)
    told["ratio_of_others"] = round(told["train_beside_other_dumps_s"] / told["train_s"], 2)
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
