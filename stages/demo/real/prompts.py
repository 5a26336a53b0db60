# SPDX-License-Identifier: Apache-2.0
"""Prompts for the pretrained target: the user's file, or written here by seed.

Out: `prompts.jsonl` for synth and `held_out.jsonl` for bench. Rows of a user's file are read as synth reads
them and shared out at random, those that begin alike to one of the two; what is written here shares no
template between them.
"""

import itertools
import json
import logging
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from shared.errors import UserError
from shared.io.files import printable, write_text
from shared.prompts import formats
from shared.prompts.rows import Unusable, parse_row
from shared.runtime.wording import counted

logger = logging.getLogger(__name__)
Domain = Literal["narrow", "broad"]
_TEMPLATES = yaml.safe_load(Path(__file__).with_name("problems.yaml").read_text(encoding="utf-8"))
WORDS: dict[str, str] = _TEMPLATES["words"]
KINDS: dict[str, list[str]] = _TEMPLATES["kinds"]
HELD_OUT_SHARE = 0.25  # of each kind's templates
# A small model drafts well on one kind of text; broad is what a night's training is for.
_DOMAINS: dict[Domain, tuple[str, ...]] = {"narrow": ("problem",), "broad": tuple(KINDS)}
_MAX_TRIES = 200


def write_prompts(
    folder: Path,
    *,
    given: Path | None,
    domain: Domain,
    rows: int,
    held_out: int,
    seed: int,
    overwrite: bool = False,
) -> None:
    """Both files in `folder`; one that holds these prompts already stays as it is.

    Raises:
        UserError: `given` cannot be read, or too few of its rows differ; or other prompts are there
            and `overwrite` is false: a run may have been made of them.
    """
    training: Sequence[str]
    testing: Sequence[str]
    if given is None:
        training = list(itertools.islice(written(domain, seed=seed, is_held_out=False), rows))
        testing = list(itertools.islice(written(domain, seed=seed, is_held_out=True), held_out))
    else:
        training, testing = _shared_out(given, rows, held_out, seed)
    parts = {folder / "prompts.jsonl": training, folder / "held_out.jsonl": testing}
    changed = {path: lines for path, lines in parts.items() if not _holds(path, lines)}
    for path in changed:
        if path.exists() and not overwrite:
            raise UserError(
                f"{path}: expected these prompts or none, found others, of an earlier run.",
                code="other-prompts",
                remedy="make real OPTIONS=--overwrite puts these in their place and makes the run anew; "
                "make real WORKSPACE=another-folder keeps both.",
            )
    for path, lines in changed.items():
        write_text(path, "".join(line + "\n" for line in lines))


def written(domain: Domain, *, seed: int, is_held_out: bool) -> Iterator[str]:
    """Distinct rows: kinds in turn, each from its own templates, until it has no more."""
    rng = random.Random(f"{seed}-{is_held_out}")
    prefix = "held-out" if is_held_out else "real"
    kinds = list(_DOMAINS[domain])
    known: set[str] = set()
    while kinds:
        for kind in tuple(kinds):
            templates = _part(KINDS[kind], is_held_out)
            tries = (_fill(rng.choice(templates), rng) for _ in range(_MAX_TRIES))
            prompt = next((text for text in tries if text not in known), None)
            if prompt is None:
                kinds.remove(kind)
                logger.warning("no new %s is found after %s", kind, counted(len(known), "row"))
                continue
            row = {"id": f"{prefix}-{len(known):05d}", "prompt": prompt, "category": kind}
            known.add(prompt)
            yield json.dumps(row)


def _part(templates: Sequence[str], is_held_out: bool) -> Sequence[str]:
    cut = len(templates) - int(len(templates) * HELD_OUT_SHARE)
    return templates[cut:] if is_held_out else templates[:cut]


def _fill(template: str, rng: random.Random) -> str:
    numbers = {name: rng.randint(3, 19) for name in "abcd"}
    words = {name: rng.choice(text.split()) for name, text in WORDS.items()}
    return template.format(**numbers, **words)


def _shared_out(
    given: Path, rows: int, held_out: int, seed: int
) -> tuple[Sequence[str], Sequence[str]]:
    """(training lines, held-out lines) of a file of prompts, each prompt once.

    What is held out begins as nothing else does, as far as the file allows it: the openings of fewest
    rows are held out first, and what is left of the last one of them is left out.
    """
    openings = _openings(given)
    lines = list(openings)
    random.Random(seed).shuffle(lines)
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for line in lines:
        alike[openings[line]].append(line)
    testing = [line for group in sorted(alike.values(), key=len) for line in group][:held_out]
    taken = {openings[line] for line in testing}
    training = [line for line in lines if openings[line] not in taken]
    if len(training) < held_out:
        raise UserError(
            f"{given}: expected at least {2 * held_out} different prompts, of which half have "
            f"openings that the others have not, found {len(lines)} with {len(alike)} openings.",
            code="prompts-too-few",
            remedy="Half of them at most may be held out: give more.",
        )
    if siblings := len(lines) - len(training) - len(testing):
        logger.warning(
            "%s: left out, since held-out ones begin alike: %s", given, counted(siblings, "row")
        )
    if (left_over := len(training) - rows) > 0:
        logger.warning(
            "%s: %d of %d rows are not used: this run takes %d and holds out %d",
            given,
            left_over,
            len(lines),
            rows,
            held_out,
        )
    return training[:rows], testing


def _openings(given: Path) -> dict[str, str]:
    """Line -> what its conversation begins with, for each different prompt of a file.

    Raises:
        UserError: the file cannot be read, or a row is no prompt.
    """
    openings: dict[str, str] = {}
    known: set[str] = set()
    repeated = 0
    for position, value in formats.rows(given):
        try:
            if isinstance(value, Unusable):
                raise value
            prompt = parse_row(value)
        except Unusable as unusable:
            why = f" ({printable(unusable.detail)})" if unusable.detail else ""
            raise UserError(
                f"{given}, {position}: expected a prompt, found {unusable.reason}{why}.",
                code="prompts-unreadable",
                remedy='Give rows like {"id": ..., "prompt": ...} or {"messages": [...]}.',
                facts={"path": str(given), "row": position, "reason": unusable.reason},
            ) from unusable
        if (content := prompt.content_hash()) in known:
            repeated += 1
            continue
        known.add(content)
        openings[_line(value)] = prompt.opening
    if repeated:
        logger.warning("%s: left out as repetitions: %s", given, counted(repeated, "row"))
    return openings


def _line(row: Any) -> str:
    """A row as a line of JSON; a table's values that JSON has no words for as text."""
    return json.dumps(row, default=str)


def _holds(path: Path, lines: Sequence[str]) -> bool:
    """Whether a file has these rows, however it spells them: earlier versions copied the user's lines."""
    if not path.exists():
        return False
    try:
        return [_line(row) for _, row in formats.rows(path)] == list(lines)
    except UserError:  # it is no file of rows at all
        return False
