# SPDX-License-Identifier: Apache-2.0
"""What a fault is done to: a tiny run, undisturbed once, and a copy of as much of it as a stage needs.

dump, train and bench stand on answers that are truly the target's; synth asks the stand-in.
"""

import dataclasses
import itertools
import json
import os
import shutil
import threading
from pathlib import Path

import yaml

from stages.synth.endpoints import PROBE
from tests import runs
from tests.faults import processes
from tests.faults.activity import Activity

STAGES = ("synth", "dump", "train", "bench")
# Artifacts that a stage makes, and those that it is given.
MAKES = {"synth": ("synth",), "dump": ("dump",), "train": ("train", "export"), "bench": ("bench",)}
NEEDS = {"synth": (), "dump": ("synth",), "train": ("dump",), "bench": ("train", "export")}
RANKS = {"EYRIE_RANKS": "2"}
_PROMPTS, _QUESTIONS = 60, 10
_SETTINGS = {
    "synth": {"prompts": "prompts.jsonl", "concurrency": 4, "rows_per_part": 5, "max_restarts": 2},
    "dump": {"batch_tokens": 256},
    "train": {"checkpoint_every_steps": 5, "eval_every_steps": 10},
    "bench": {
        "prompts": "questions.jsonl",
        "concurrency": 2,
        "max_tokens": 32,
        "min_acceptance_length": 1.0,
    },
}


@dataclasses.dataclass(frozen=True)
class World:
    """A workspace that may be broken."""

    path: Path

    @property
    def root(self) -> Path:
        return self.path / "run"

    def folders(self, stage: str) -> list[Path]:
        return [self.root / name for name in MAKES[stage]]


@dataclasses.dataclass(frozen=True)
class Reference:
    """An undisturbed run of a stage.

    Attributes:
        root: its run's folder.
        changes: how often its folders were seen to change.
        bytes: what the stage left there.
    """

    root: Path
    changes: int
    bytes: int


class Bed:
    """Everything made once, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count(1)
        self._making = threading.RLock()  # faults may be played at a time, and share these
        self._references: dict[tuple[str, bool], Reference] = {}
        base = folder / "base"
        base.mkdir(parents=True)
        runs.make_synth(base)
        _write_settings(base)
        self._base = World(base)

    def reference(self, stage: str, *, ranks: bool = False) -> Reference:
        """The stage undisturbed, made where it is first asked for."""
        with self._making:
            if (stage, ranks) not in self._references:
                self._references[stage, ranks] = self._undisturbed(stage, ranks)
            return self._references[stage, ranks]

    def _undisturbed(self, stage: str, ranks: bool) -> Reference:
        world = self.world(stage)
        activity = Activity(world.folders(stage))
        more = RANKS if ranks else None
        with processes.Stage(world.path, stage, more=more) as process:
            activity.watch(process.has_ended)
            if process.wait() != 0:
                raise RuntimeError(process.said())
        made = [path for f in world.folders(stage) for path in f.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in made)
        return Reference(world.root, activity.changes, size)

    def world(self, stage: str) -> World:
        """A copy with all that `stage` needs, and nothing of what it makes."""
        world = World(self.folder / f"{next(self._numbers):04d}-{stage}")
        world.root.mkdir(parents=True)
        for path in self._base.path.iterdir():
            if path.name == "tiny":  # nothing here changes the target
                shutil.copytree(path, world.path / "tiny", copy_function=os.link)
            elif path.is_file():
                shutil.copy(path, world.path)
        for name in NEEDS[stage]:
            maker = next(each for each in STAGES if name in MAKES[each])
            source = self._base.root if name == "synth" else self.reference(maker).root
            shutil.copytree(source / name, world.root / name, symlinks=True)
        return world


def _write_settings(workspace: Path) -> None:
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    for section, settings in _SETTINGS.items():
        recipe.setdefault(section, {}).update(settings)
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name, number in (("prompts", _PROMPTS), ("questions", _QUESTIONS)):
        rows = [
            {"id": f"{name}-{index:02d}", "turns": [f"What is {index}?", "And its square?"]}
            if index % 5 == 0
            else {"id": f"{name}-{index:02d}", "prompt": f"Tell me about {index} {name}."}
            for index in range(number)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (workspace / f"{name}.jsonl").write_text(text)
    write_tokens(workspace)


def write_tokens(workspace: Path) -> None:
    """What the target's tokenizer makes of the text that synth asks a foreign server about."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workspace / "tiny")
    encoded = tokenizer.apply_chat_template(PROBE, add_generation_prompt=True, return_dict=True)
    (workspace / "tokens").write_text(" ".join(map(str, encoded["input_ids"])))
