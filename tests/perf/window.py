# SPDX-License-Identifier: Apache-2.0
"""Does train beside dump take longer than the slower of the two?   python -m tests.perf.window WORKSPACE

In: the workspace of a finished demo, which is only read. Out: the seconds of `ops run` for dump alone
on one core, for train alone on another, and for both at once on the two, with a window of shards; and
the same epochs and shard size everywhere. Each has its process's start in it. The last line is JSON.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "compose" / "recipes" / "demo" / "recipe.yaml"
SHARD_BYTES = 6_000_000  # the demo's states fill some 26 of them


def seconds(folder: Path, recipe: dict[str, Any], stages: str, cores: Collection[int]) -> float:
    """The time of `ops run` for these stages, which sees no other cores."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "stages.ops", "run", "--recipe", str(path)]
    started_s = time.perf_counter()
    subprocess.run(
        [*command, "--workspace", str(folder), "--only", stages],
        cwd=ROOT,
        check=True,
        stdout=sys.stderr,
        preexec_fn=functools.partial(os.sched_setaffinity, 0, cores),
    )
    return round(time.perf_counter() - started_s, 1)


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
    recipe["train"] |= {"epochs": given.epochs}
    told: dict[str, Any] = {"backend": given.backend, "window_shards": given.window_shards}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "targets").symlink_to((given.workspace / "targets").resolve())
        for run in ("alone", "together"):
            (folder / run).mkdir()
            synth = (given.workspace / "demo" / "synth").resolve()
            (folder / run / "synth").symlink_to(synth)
        recipe["run"]["name"] = "alone"
        told["dump_s"] = seconds(folder, recipe, "dump", [first])
        told["train_s"] = seconds(folder, recipe, "train", [second])
        told["shards"] = len(list((folder / "alone" / "dump").glob("shard_*.pt")))
        recipe["run"]["name"] = "together"
        recipe["dump"]["window_shards"] = given.window_shards
        recipe["train"]["follow"] = True
        told["together_s"] = seconds(folder, recipe, "dump,train", [first, second])
    told["ratio"] = round(told["together_s"] / max(told["dump_s"], told["train_s"]), 2)
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
