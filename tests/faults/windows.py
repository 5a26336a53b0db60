# SPDX-License-Identifier: Apache-2.0
"""dump and train side by side (`dump.window_shards`), broken on purpose.

    python -m tests.faults.windows --seed 1 --faults 40

Each fault is drawn from the seed: a kind, and a moment among the changes in both folders. Afterwards
both are started again until both are done. The head, the vocabulary and the history must be those of
an undisturbed run, and no shard may be gone that train's last checkpoint does not cover. In: a seed, a
number. Out: a line a fault, and a last line of JSON. Cost: some 20 seconds a fault on one core.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

from shared.errors import EXIT_DONE, EXIT_RETRY, EXIT_STOPPED, EXIT_USER
from tests import runs
from tests.faults import disks, judge, processes
from tests.faults.activity import Activity
from tests.faults.bed import World
from tests.faults.case import errors_in

KINDS = ("kill dump", "kill train", "kill both", "kill an engine", "stop both", "disk full")
SHARDS, WINDOW = 12, 4
# Longer than a stage takes to start on a busy machine.
PATIENCE_S = 20
_RUNS = 6
_SEEN = 0.8  # of the undisturbed run's changes are seen on a busy machine


class Bed:
    """The inputs, made once, and an undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._base = folder / "base"
        self._base.mkdir(parents=True)
        runs.make_synth(self._base, num_rows=2 * SHARDS)
        write_recipe(self._base)
        self._numbers = itertools.count()
        self.reference = self.world()
        activity = Activity(_folders(self.reference))
        with _both(self.reference) as pair:
            activity.watch(lambda: all(each.has_ended() for each in pair))
            if [each.wait() for each in pair] != [EXIT_DONE] * 2:
                raise RuntimeError("\n".join(each.said() for each in pair))
        self.changes = activity.changes
        made = [p for f in _folders(self.reference) for p in f.rglob("*") if p.is_file()]
        self.bytes = sum(path.stat().st_size for path in made)

    def world(self) -> World:
        world = World(self.folder / f"{next(self._numbers):03d}")
        shutil.copytree(self._base, world.path, symlinks=True)
        return world


def write_recipe(
    workspace: Path,
    *,
    window_shards: int = WINDOW,
    epochs: int = 2,
    patience_s: int = PATIENCE_S,
    **train: object,
) -> None:
    """The tiny run's recipe with a window: two rows a shard, two a step.

    Args:
        train: settings of train on top.
    """
    train = {
        "batch_tokens": 2 * (runs.PROMPT_TOKENS + runs.ANSWER_TOKENS),
        "follow": True,
        "epochs": epochs,
        "max_holdout_samples": 2,
        "eval_every_steps": 4,
        "checkpoint_every_steps": 1000,
        "mixed_precision": "no",
        "patience_s": patience_s,
        "plateau_fraction": None,
        **train,
    }
    path = runs.write_recipe(workspace, **train)
    recipe = yaml.safe_load(path.read_text())
    recipe["dump"] |= {
        "shard_bytes": 65_000,
        "window_shards": window_shards,
        "patience_s": patience_s,
    }
    path.write_text(yaml.safe_dump(recipe))


def _folders(world: World) -> list[Path]:
    return [world.root / name for name in ("dump", "train", "export")]


@contextlib.contextmanager
def _both(world: World, *of_dump: str) -> Iterator[Sequence[processes.Stage]]:
    with (
        processes.Stage(world.path, "dump", *of_dump) as dump,
        processes.Stage(world.path, "train") as train,
    ):
        yield dump, train


def play(bed: Bed, kind: str, chance: random.Random) -> tuple[World, list[str]]:
    """One fault, and the recovery from it; (where, what was wrong)."""
    world, problems = bed.world(), list[str]()
    flags = ("--data_parallel", "2") if kind == "kill an engine" else ()
    with contextlib.ExitStack() as stack:
        make_large: Callable[[], None] = lambda: None  # noqa: E731
        if kind == "disk full" and disks.can_mount():
            size = int(chance.uniform(0.1, 0.95) * bed.bytes)
            make_large = stack.enter_context(disks.small(world.root, size))
        with _both(world, *flags) as (dump, train):
            if kind != "disk full":
                after = chance.randint(1, max(1, round(_SEEN * bed.changes)))
                Activity(_folders(world)).watch(
                    lambda: dump.has_ended() and train.has_ended(), until=after
                )
                time.sleep(chance.uniform(0, 0.01))
            _harm(kind, dump, train, chance)
            codes = [dump.wait(), train.wait()]
            allowed = {EXIT_DONE, EXIT_RETRY, -signal.SIGKILL}
            allowed |= {EXIT_STOPPED} if kind == "stop both" else set()
            allowed |= {EXIT_USER} if kind == "disk full" else set()
            if not allowed.issuperset(codes):
                told = [errors_in(each.said())[-1:] for each in (dump, train)]
                problems.append(f"exit codes {codes}: {told}")
        problems += lost(world)
        make_large()
        problems += _recover(world, flags)
        problems += judged(world, bed.reference)
        problems += judge.untidy(world)
    return world, problems


def _harm(kind: str, dump: processes.Stage, train: processes.Stage, chance: random.Random) -> None:
    if kind == "kill an engine":
        if found := processes.children(dump.pid, "stages.dump"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(found), signal.SIGKILL)
        return
    hit = {"kill dump": [dump], "kill train": [train], "disk full": []}.get(kind, [dump, train])
    for each in hit:
        if not each.has_ended():
            each.signal(signal.SIGTERM if kind == "stop both" else signal.SIGKILL)


def lost(world: World) -> list[str]:
    """Shards that were whole, are gone, and are ahead of train's last checkpoint."""
    path = world.root / "train" / "reading.json"
    if not path.exists():
        return []
    reading = json.loads(path.read_text())
    # Every step reads one shard, so that visits are steps.
    latest = world.root / "train" / "checkpoints" / "latest.pt"
    step = int(latest.resolve().stem[5:]) if latest.exists() else 0
    if reading["next"] > step:
        return [f"dump was told {reading['next']}, and the last checkpoint is of step {step}"]
    made = {int(each.stem[6:]) for each in (world.root / "dump").glob("shard_*.json")}
    gone = {i for i in made if not (world.root / "dump" / f"shard_{i:05d}.pt").exists()}
    # A shard of a later epoch may be gone until its turn comes.
    ahead = reading["order"][reading["next"] : reading["next"] + WINDOW - len(reading["kept"])]
    was_read = set(reading["order"][: reading["next"]])
    return [f"shard {i} is gone" for i in gone & ({*ahead} - was_read | {*reading["kept"]})]


def _recover(world: World, flags: Sequence[str]) -> list[str]:
    codes, said = [-1, -1], ""
    for _ in range(_RUNS):
        with _both(world, *flags) as pair:
            codes = [each.wait() for each in pair]
            said = "\n".join(line for each in pair for line in errors_in(each.said()))
        if codes == [EXIT_DONE, EXIT_DONE]:
            return []
        if not {EXIT_DONE, EXIT_RETRY}.issuperset(codes):
            break
    return [f"run again: {codes}: {said[-600:]}"]


def judged(world: World, reference: World) -> list[str]:
    """What differs from the undisturbed run."""
    found = []
    for name in ("export/model.safetensors", "train/d2t.npy"):
        path = world.root / name
        if not path.exists() or path.read_bytes() != (reference.root / name).read_bytes():
            found.append(f"{name} differs")
    if _history(world) != _history(reference):
        found.append("the history differs")
    return found


def _history(world: World) -> list[tuple[int, float, float]]:
    path = world.root / "train" / "history.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    keys = ("loss", "walked_acceptance_length")  # sums of a resumed run differ in the last digits
    return [(each["step"], *(round(each.get(key, 0), 5) for key in keys)) for each in records]


def campaign(bed: Bed, *, seed: int, faults: int, first: int = 0) -> Iterator[list[str]]:
    """The problems of each fault, told as they come; a world with problems is kept."""
    for number in range(first, first + faults):
        chance, kind = random.Random(f"{seed}/{number}"), KINDS[number % len(KINDS)]
        began_s = time.monotonic()
        world, problems = play(bed, kind, chance)
        what = "recovered" if not problems else f"NOT RECOVERED {problems} kept: {world.path}"
        sys.stdout.write(f"{number:3} {kind:15} {time.monotonic() - began_s:5.1f} s {what}\n")
        sys.stdout.flush()
        if not problems:
            shutil.rmtree(world.path)
        yield problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=len(KINDS))
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="eyrie-windows-"))
    told = list(campaign(Bed(folder), **vars(given)))
    bad = sum(map(bool, told))
    sys.stdout.write(json.dumps({"faults": len(told), "recovered": len(told) - bad}) + "\n")
    if not bad:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
