# SPDX-License-Identifier: Apache-2.0
"""Do memory and open files stay as they are while a stage runs for long?

    python -m tests.faults.long_runs [--runs synth,dump,train]

In: nothing. Out: a line a run; exit 1 where the mean of the last quarter is more than 2 % above or
below that of the second one. The first quarter warms up. Cost: one to two minutes each. The surprise:
only the work itself counts, from the first thing done to the last but one: what comes after (adding
up, the export) takes memory of its own, once.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests import runs
from tests.faults.bed import World, write_tokens
from tests.faults.processes import Stage

LIMIT = 0.02
_PERIOD_S = 0.05
_PAGE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Figures:
    """Means of the second and of the last quarter of the work."""

    name: str
    samples: int
    seconds: float
    memory_mib: tuple[float, float]
    files: tuple[float, float]

    @property
    def growth(self) -> float:
        """The larger change of the two, as a share."""
        return max(abs(last / second - 1) for second, last in (self.memory_mib, self.files))

    def line(self) -> str:
        told = [
            f"{what} {second:.1f} -> {last:.1f} ({last / second - 1:+.2%})"
            for what, (second, last) in (("MiB", self.memory_mib), ("files", self.files))
        ]
        return f"{self.name}: {', '.join(told)}; {self.samples} samples in {self.seconds:.0f} s"


def figures(name: str, found: list[tuple[int, float, float]], seconds: float) -> Figures:
    """From samples of (what is done, MiB, open files), of which only the work's count."""
    most = max(done for done, _, _ in found)
    work = [sample for sample in found if 0 < sample[0] < most]
    quarter = len(work) // 4
    if quarter < 10:
        raise RuntimeError(f"{name}: only {len(work)} samples of the work")
    second, last = work[quarter : 2 * quarter], work[-quarter:]

    def means(column: int) -> tuple[float, float]:
        first, then = (statistics.fmean(s[column] for s in part) for part in (second, last))
        return first, then

    return Figures(name, len(work), seconds, means(1), means(2))


def watched(name: str, world: World, stage: str, done: Callable[[Path], int]) -> Figures:
    """Run a stage to its end and sample its process; `done` tells how far its folder is."""
    found, began_s = [], time.monotonic()
    with Stage(world.path, stage, more={"STAND_IN_DELAY_S": "0"}) as process:
        folder = Path(f"/proc/{process.pid}")
        while not process.has_ended():
            try:
                pages = int((folder / "statm").read_text().split()[1])
                open_files = len(list((folder / "fd").iterdir()))
            except (OSError, IndexError):  # it ends
                break
            mib = pages * _PAGE_BYTES / 2**20
            found.append((done(world.root / stage), mib, float(open_files)))
            time.sleep(_PERIOD_S)
        if process.wait() != 0:
            raise RuntimeError(process.said())
    return figures(name, found, time.monotonic() - began_s)


def _world(folder: Path, *, copies: int = 1, **settings: dict[str, object]) -> World:
    folder.mkdir()
    runs.make_synth(folder, copies=copies)
    path = folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    for section, values in settings.items():
        recipe[section] |= values
    path.write_text(yaml.safe_dump(recipe))
    return World(folder)


def synth(folder: Path, rows: int = 10_000) -> Figures:
    """Rows asked of the stand-in, which answers at once."""
    world = _world(folder, synth={"concurrency": 16, "rows_per_part": 100})
    lines = [json.dumps({"id": f"r{n}", "prompt": f"Tell me of {n}."}) + "\n" for n in range(rows)]
    (folder / "prompts.jsonl").write_text("".join(lines))
    write_tokens(folder)
    (world.root / "synth").rename(world.root / "unused")
    name = f"synth, {rows} rows"
    return watched(name, world, "synth", lambda at: len(list(at.glob("part-*.parquet"))))


def dump(folder: Path, samples: int = 2_000) -> Figures:
    """Samples captured with transformers."""
    world = _world(folder, copies=samples // 40)
    name = f"dump, {samples} samples"
    return watched(name, world, "dump", lambda at: len(list(at.glob("shard_*.json"))))


def train(folder: Path, steps: int = 500) -> Figures:
    """Optimizer steps, with checkpoints and walks on the way."""
    settings = {"epochs": -(-steps // 9), "checkpoint_every_steps": 50, "eval_every_steps": 50}
    world = _world(folder, train=settings)
    with Stage(world.path, "dump") as process:
        if process.wait() != 0:
            raise RuntimeError(process.said())

    def done(at: Path) -> int:
        path = at / "history.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    return watched(f"train, {steps} steps", world, "train", done)


RUNS: dict[str, Callable[[Path], Figures]] = {"synth": synth, "dump": dump, "train": train}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default=",".join(RUNS))
    bad = 0
    for name in parser.parse_args().runs.split(","):
        with tempfile.TemporaryDirectory(prefix="eyrie-long-") as folder:
            found = RUNS[name](Path(folder) / name)
        bad += found.growth > LIMIT
        sys.stdout.write(found.line() + "\n")
        sys.stdout.flush()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
