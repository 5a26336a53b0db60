# SPDX-License-Identifier: Apache-2.0
"""Prompts for the pretrained target: the user's; else the hub's; else those that are written here by seed.

Out: `prompts.jsonl` for synth, `held_out.jsonl` for bench, and `prompts.json`, which says where they came
from. The same command keeps the prompts that are there, whatever a hub answers by then.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.errors import RetryableError, UserError
from shared.io import files
from shared.io.records import Shape, read_record
from shared.paths import find_input
from shared.prompts import formats, sources
from shared.prompts.rows import Prompt, Unusable, parse_row
from shared.prompts.sources import Source
from shared.runtime.wording import counted
from stages.demo.real import on_hub
from stages.demo.real.given import LABEL, Sides, of_source
from stages.demo.real.written import Domain, both_sides

TRAINING, HELD_OUT, RECORD = "prompts.jsonl", "held_out.jsonl", "prompts.json"
OWN = "own"  # the word for those that are written here

logger = logging.getLogger(__name__)


class _Record(Shape):
    """`prompts.json`."""

    taken_from: list[str]
    asked: dict[str, Any]
    sha256: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Asked:
    """Which prompts are asked for, and how many of each side.

    Attributes:
        given: a source as synth's `prompts` names it, or `own`; None leaves the choice to the hub.
        workspace: where a relative path is looked for first.
    """

    given: str | None
    workspace: Path
    domain: Domain
    rows: int
    held_out: int
    seed: int

    @property
    def source(self) -> Source | None:
        """What is given; None where it is nothing, or the word `own` and no file of that name."""
        if self.given is None or (self.given == OWN and not find_input(OWN, self.workspace)):
            return None
        return Source(path=self.given)

    def as_dict(self) -> dict[str, Any]:
        """What decides about the prompts, the content of what is given among it.

        Raises:
            UserError: there is no such source.
        """
        source, kept = self.source, ("given", "domain", "rows", "held_out", "seed")
        digest = sources.digest(source, self.workspace, label=LABEL) if source else None
        return {name: getattr(self, name) for name in kept} | {"digest": digest}


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Prompts of both sides, where they came from, and by what they were asked for."""

    taken_from: list[str]
    sides: Sides
    asked: dict[str, Any]


def choose_prompts(folder: Path, asked: Asked, *, overwrite: bool = False) -> Chosen | None:
    """The prompts that `write_prompts` is to write; None where the folder keeps those that it has.

    Raises:
        UserError: what is given cannot be read, or too few of its rows differ; or other prompts are there
            and `overwrite` is false: a run may have been made of them.
        RetryableError: a hub's data set is given, and the hub does not answer.
    """
    record = asked.as_dict()
    if not overwrite and (kept := _kept(folder, record)):
        logger.info("the prompts in %s are kept, of %s", folder, ", ".join(kept))
        return None
    chosen = Chosen(*_found(folder, asked, overwrite), record)
    for path, prompts in _in_folder(folder, chosen.sides).items():
        if path.exists() and not overwrite and not _holds(path, prompts):
            raise UserError(
                f"{path}: expected prompts of {', '.join(chosen.taken_from)}, or none, found others, of an "
                "earlier run.",
                code="other-prompts",
                remedy="make real OPTIONS=--overwrite puts these in their place and makes the run anew; "
                "make real WORKSPACE=another-folder keeps both.",
            )
    return chosen


def write_prompts(folder: Path, chosen: Chosen) -> None:
    """The files of both sides, one that holds these prompts already as it is; their record comes last."""
    files.unlink(folder, RECORD)
    parts = _in_folder(folder, chosen.sides)
    for path, prompts in parts.items():
        if not _holds(path, prompts):
            files.write_text(path, "".join(json.dumps(each.as_row()) + "\n" for each in prompts))
    record = {
        "taken_from": chosen.taken_from,
        "asked": chosen.asked,
        "sha256": {path.name: files.sha256(path) for path in parts},
    }
    files.write_json(folder / RECORD, record)
    training, held_out = map(len, chosen.sides)
    logger.info(
        "%s to train on and %d held out, of %s",
        counted(training, "prompt"),
        held_out,
        ", ".join(chosen.taken_from),
    )


def _in_folder(folder: Path, sides: Sides) -> dict[Path, list[Prompt]]:
    return dict(zip((folder / TRAINING, folder / HELD_OUT), sides, strict=True))


def _found(folder: Path, asked: Asked, overwrite: bool) -> tuple[list[str], Sides]:
    """Where the prompts come from, and both sides."""
    counts = {"rows": asked.rows, "held_out": asked.held_out, "seed": asked.seed}
    if source := asked.source:
        return [source.path], of_source(source, asked.workspace, **counts)
    own = both_sides(asked.domain, **counts)
    # Begun with them: a hub that answers by now is asked for a new run only.
    is_begun = not overwrite and any(_holds(*part) for part in _in_folder(folder, own).items())
    if asked.given != OWN and not is_begun:
        try:
            names = on_hub.names(asked.domain, asked.workspace)
            return names, on_hub.from_hub(asked.domain, asked.workspace, **counts)
        except (UserError, RetryableError) as error:
            logger.warning("%s Writing prompts of our own.", error.problem)
    return [f"our own templates, by seed {asked.seed}"], own


def _kept(folder: Path, wanted: dict[str, Any]) -> list[str] | None:
    """Where the folder's prompts came from, if it has those that are asked for."""
    with contextlib.suppress(UserError):  # no record, no files: there is nothing to keep
        record = read_record(folder / RECORD, _Record, remedy="")
        hashes = {name: files.sha256(folder / name) for name in (TRAINING, HELD_OUT)}
        if record["asked"] == wanted and record["sha256"] == hashes:
            return list(record["taken_from"])
    return None


def _holds(path: Path, prompts: Sequence[Prompt]) -> bool:
    """Whether a file has these prompts, however it spells them."""
    if not path.exists():
        return False
    try:
        found = [parse_row(row) for _, row in formats.rows(path)]
    except (UserError, Unusable):  # it is no file of prompts at all
        return False
    return list(map(_identity, found)) == list(map(_identity, prompts))


def _identity(prompt: Prompt) -> tuple[str, str, str]:
    return prompt.sample_id, prompt.category, prompt.content_hash()
