# SPDX-License-Identifier: Apache-2.0
"""Prompts for the pretrained target: the user's file, or written here by seed.

Out: `prompts.jsonl` for synth and `held_out.jsonl` for bench. Rows of a user's file are shared out at
random; what is written here shares no template between the two.
"""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import yaml

from shared.errors import UserError
from shared.io.files import write_text

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
    """Both files in `folder`.

    Raises:
        UserError: `given` cannot be read or has fewer than twice the rows that are held out, or other
            prompts are there and `overwrite` is false: a run may have been made of them.
    """
    training: Sequence[str]
    testing: Sequence[str]
    if given is None:
        training = list(itertools.islice(written(domain, seed=seed, is_held_out=False), rows))
        testing = list(itertools.islice(written(domain, seed=seed, is_held_out=True), held_out))
    else:
        training, testing = _shared_out(given, rows, held_out, seed)
    files = {
        folder / name: "".join(line + "\n" for line in lines)
        for name, lines in (("prompts.jsonl", training), ("held_out.jsonl", testing))
    }
    for path, text in files.items():
        if path.exists() and not overwrite and path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{path}: expected these prompts or none, found others, of an earlier run.",
                code="other-prompts",
                remedy="make real OPTIONS=--overwrite puts these in their place and makes the run anew; "
                "make real WORKSPACE=another-folder keeps both.",
            )
    for path, text in files.items():
        write_text(path, text)


def written(domain: Domain, *, seed: int, is_held_out: bool) -> Iterator[str]:
    """Distinct rows without end: kinds in turn, each from its own templates."""
    rng = random.Random(f"{seed}-{is_held_out}")
    kinds = _DOMAINS[domain]
    known: set[str] = set()
    for index, kind in enumerate(itertools.cycle(kinds)):
        templates = _part(KINDS[kind], is_held_out)
        for _ in range(_MAX_TRIES):
            prompt = _fill(rng.choice(templates), rng)
            if prompt not in known:
                break
        known.add(prompt)
        prefix = "held-out" if is_held_out else "real"
        row = {"id": f"{prefix}-{index:05d}", "prompt": prompt, "category": kind}
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
    """(training lines, held-out lines) of a JSON Lines file."""
    try:
        lines = [line for line in given.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"could not read {given}: {error}.",
            code="prompts-unreadable",
            remedy="Give a file with one JSON object per line.",
        ) from error
    for number, line in enumerate(lines, start=1):
        if not _is_object(line):
            raise UserError(
                f"{given}: expected a JSON object on each line, found row {number}: {line[:80]!r}.",
                code="prompts-unreadable",
                remedy='Give rows like {"id": ..., "prompt": ...} or {"messages": [...]}.',
            )
    if len(lines) < 2 * held_out:
        raise UserError(
            f"{given}: expected at least {2 * held_out} rows, found {len(lines)}.",
            code="prompts-too-few",
            remedy="Half of them at most may be held out: give more.",
        )
    random.Random(seed).shuffle(lines)
    return lines[held_out : held_out + rows], lines[:held_out]


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
