# SPDX-License-Identifier: Apache-2.0
"""Breaks stages on purpose, a seed a campaign, and sees whether they recover.

    python -m tests.faults.campaign --seed 1 --faults 200 [--stages synth,dump] [--kinds "kill -9"]

In: a seed, a number of faults. Out: a line a fault, a table of faults by kind and stage, and a last
line of JSON; exit 1 where one did not recover, and its world is kept. Cost: 5 to 10 seconds a fault.
Real processes, without an engine: tests/faults/stand_in is the server that synth and bench start, and
dump captures with transformers.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.faults.bed import STAGES, Bed
from tests.faults.kinds import KINDS, PAIRS

_DRAWS = 3  # of a moment, where a stage had ended before it came


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    number: int
    kind: str
    stage: str
    detail: str
    codes: list[int]
    problems: list[str]
    seconds: float
    world: Path

    def line(self) -> str:
        what = "recovered" if not self.problems else "NOT RECOVERED"
        codes = " ".join(map(str, self.codes))
        told = "".join(f"\n     {problem}" for problem in self.problems)
        where = f"\n     kept: {self.world}" if self.problems else ""
        return (
            f"{self.number:4} {self.kind:24} {self.stage:6} {self.seconds:5.1f} s {what} "
            f"[{codes}] {self.detail}{told}{where}"
        )


def drawn(
    seed: int, stages: Sequence[str], kinds: Sequence[str]
) -> Iterator[tuple[int, str, str, random.Random]]:
    """(number, kind, stage, chance) without end: each pair once before any comes again."""
    pairs = [(kind, stage) for kind, stage in PAIRS if kind in kinds and stage in stages]
    random.Random(seed).shuffle(pairs)
    number = 0
    while True:
        for kind, stage in pairs:
            yield number, kind, stage, random.Random(f"{seed}/{number}")
            number += 1


def _played(bed: Bed, number: int, kind: str, stage: str, chance: random.Random) -> Outcome:
    began_s = time.monotonic()
    for _ in range(_DRAWS):
        case = KINDS[kind][0](bed, stage, chance)
        if not case.problems:
            shutil.rmtree(case.world.path)
        if case.problems or not case.came_late:
            break
    spent_s = time.monotonic() - began_s
    told = (case.detail, case.codes, case.problems)
    return Outcome(number, kind, stage, *told, spent_s, case.world.path)


def play(
    bed: Bed,
    *,
    seed: int,
    faults: int,
    stages: Sequence[str] = STAGES,
    kinds: Sequence[str] = tuple(KINDS),
    first: int = 0,
    jobs: int = 2,
    seconds: float = math.inf,
) -> Iterator[Outcome]:
    """The faults `first` to `first + faults` of the seed's, `jobs` at a time, told in their order.

    Args:
        seconds: none is begun after so many.
    """
    until_s = time.monotonic() + seconds
    chosen = itertools.islice(drawn(seed, stages, kinds), first, first + faults)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        played = pool.map(
            lambda fault: _played(bed, *fault) if time.monotonic() < until_s else None, chosen
        )
        yield from filter(None, played)


def table(outcomes: Sequence[Outcome]) -> str:
    """Faults by kind and stage, as Markdown: recovered of all."""
    done: collections.Counter[tuple[str, str]] = collections.Counter()
    right: collections.Counter[tuple[str, str]] = collections.Counter()
    for each in outcomes:
        for stage in (each.stage, "all"):
            for kind in (each.kind, "all"):
                done[kind, stage] += 1
                right[kind, stage] += not each.problems
    lines = [f"| fault | {' | '.join((*STAGES, 'all'))} |", "|---" * (len(STAGES) + 2) + "|"]
    for kind in (*KINDS, "all"):
        cells = [
            f"{right[kind, stage]} of {done[kind, stage]}" if done[kind, stage] else ""
            for stage in (*STAGES, "all")
        ]
        if any(cells):
            lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=len(PAIRS))
    parser.add_argument("--first", type=int, default=0, help="number of the first fault")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin none after so many")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--folder", type=Path, help="where worlds are made; default a new one")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="eyrie-faults-"))
    began_s = time.monotonic()
    bed = Bed(folder / "bed")
    outcomes = []
    stages, kinds = given.stages.split(","), given.kinds.split(",")
    drawing = {"seed": given.seed, "faults": given.faults, "first": given.first}
    drawing |= {"seconds": given.seconds, "jobs": given.jobs}
    for outcome in play(bed, **drawing, stages=stages, kinds=kinds):
        outcomes.append(outcome)
        sys.stdout.write(outcome.line() + "\n")
        sys.stdout.flush()
    bad = [each.number for each in outcomes if each.problems]
    if not bad:
        shutil.rmtree(folder)
    sys.stdout.write(f"\n{table(outcomes)}\n\n")
    told = {
        "seed": given.seed,
        "faults": len(outcomes),
        "recovered": len(outcomes) - len(bad),
        "not_recovered": bad,
        "seconds": round(time.monotonic() - began_s),
    }
    sys.stdout.write(json.dumps(told) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
