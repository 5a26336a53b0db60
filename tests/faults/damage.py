# SPDX-License-Identifier: Apache-2.0
"""A finished artifact that is not what it was: cut short, or with one bit turned over.

Whoever reads it next must refuse it with exit 2 and its name. Where reading all of it would cost too
much, `ops validate` must name it; and bits that mean nothing may stay unseen where nothing changes.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from shared.errors import EXIT_DONE, EXIT_OUTPUT, EXIT_USER
from tests.faults import judge, processes
from tests.faults.bed import Bed
from tests.faults.case import Case, errors_in

MANIFEST = "manifest.json"


def truncated(bed: Bed, stage: str, chance: random.Random) -> Case:
    """A file ends early."""
    case, path = _victim(bed, stage, chance)
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])
    _meet(case, path)
    case.obeys = True
    case.recover()
    return case


def flipped(bed: Bed, stage: str, chance: random.Random) -> Case:
    """One bit of a file is another one."""
    case, path = _victim(bed, stage, chance)
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content))
    content[at] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    case.detail += f", byte {at}"
    told = _meet(case, path)
    case.obeys = True
    asked = case.obey(told) if told else None
    case.recover(*(("--overwrite",) if asked is None else asked))
    return case


def _victim(bed: Bed, stage: str, chance: random.Random) -> tuple[Case, Path]:
    """A world where the stage is done and nothing after it, and one of the stage's files."""
    case = Case(bed, stage, chance, world=bed.world("dump") if stage == "synth" else None)
    name = chance.choice(("train", "export")) if stage == "train" else stage
    folder = case.world.root / name
    if stage != "synth":  # whose answers, which dump takes, were the target's from the start
        for each in case.world.folders(stage):
            source = case.reference.root / each.name
            shutil.copytree(source, each, symlinks=True)
    if name == "train":
        shutil.rmtree(case.world.root / "export")
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    names = [MANIFEST, *(each for each in listed if (folder / each).stat().st_size)]
    path = folder / chance.choice(names)
    case.detail = str(path.relative_to(case.world.root))
    return case, path


def _reader(case: Case, path: Path) -> tuple[str, list[str]]:
    """The stage that reads the file, and its words."""
    if case.stage == "bench":
        return "bench", ["compare", "run", "run", "--out", str(case.world.path / "page.html")]
    reader = {"synth": "dump", "dump": "train", "train": "train", "export": "bench"}
    name = reader["export" if path.parent.name == "export" else case.stage]
    return name, ["run", "--recipe", str(case.world.path / "recipe.yaml")]


def _command(case: Case, stage: str, words: list[str]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}", *words, "--workspace", str(case.world.path)],
        cwd=processes.ROOT,
        env=processes.environment(case.world.path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=processes.LIMIT_S,
    )
    return done.returncode, done.stdout


def _meet(case: Case, path: Path) -> str:
    """Let the next one read it; its refusal, if it does refuse."""
    reader, words = _reader(case, path)
    code, said = _command(case, reader, words)
    case.codes.append(code)
    if "Traceback" in said:
        case.problems.append(f"{reader} ends in a traceback: {said[-300:]}")
    names = {path.name, path.resolve().name}  # best.pt is a link
    if path.name == MANIFEST:  # where it and a file disagree, either may be the damaged one
        names.add(str(path.parent))
    if code == EXIT_USER and any(name in "".join(errors_in(said)) for name in names):
        case.detail += f": refused by {reader}"
        return errors_in(said)[-1]
    if code != EXIT_DONE:
        case.problems.append(f"{reader}: exit {code}, the file not named: {errors_in(said)[-1:]}")
        return ""
    code, said = _command(case, "ops", ["validate", "run", "--only", case.stage, "--json"])
    if code == EXIT_OUTPUT and any(name in said for name in names):
        case.detail += ": seen by validate"
    elif path.name == MANIFEST and _changes_nothing(case, reader):
        case.detail += f": means nothing to {reader}"
    else:
        case.problems.append(f"used by {reader} in silence (validate: exit {code})")
    return ""


def _changes_nothing(case: Case, reader: str) -> bool:
    if case.stage == "bench":
        return True  # a report is read without its manifest
    return not judge.differences(reader, case.world, case.bed.reference(reader))
