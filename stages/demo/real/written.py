# SPDX-License-Identifier: Apache-2.0
"""Prompts that are written by seed, of templates; what is held out shares no template with the others."""

import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import yaml

from shared.prompts.rows import Prompt, parse_row
from shared.runtime.wording import counted

Domain = Literal["narrow", "broad"]
_TEMPLATES = yaml.safe_load(Path(__file__).with_name("problems.yaml").read_text(encoding="utf-8"))
WORDS: dict[str, str] = _TEMPLATES["words"]
KINDS: dict[str, list[str]] = _TEMPLATES["kinds"]
HELD_OUT_SHARE = 0.25  # of each kind's templates
# A small model drafts well on one kind of text; broad is what a night's training is for.
_DOMAINS: dict[Domain, tuple[str, ...]] = {"narrow": ("problem",), "broad": tuple(KINDS)}
_MAX_TRIES = 200

logger = logging.getLogger(__name__)


def both_sides(
    domain: Domain, *, rows: int, held_out: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and held out."""
    training = written(domain, rows, seed=seed, is_held_out=False)
    return training, written(domain, held_out, seed=seed, is_held_out=True)


def written(domain: Domain, count: int, *, seed: int, is_held_out: bool) -> list[Prompt]:
    """Up to `count` distinct prompts: kinds in turn, each from its own templates, until it has no more."""
    return list(itertools.islice(_distinct(domain, seed, is_held_out), count))


def _distinct(domain: Domain, seed: int, is_held_out: bool) -> Iterator[Prompt]:
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
            yield parse_row(row)


def _part(templates: Sequence[str], is_held_out: bool) -> Sequence[str]:
    cut = len(templates) - int(len(templates) * HELD_OUT_SHARE)
    return templates[cut:] if is_held_out else templates[:cut]


def _fill(template: str, rng: random.Random) -> str:
    numbers = {name: rng.randint(3, 19) for name in "abcd"}
    words = {name: rng.choice(text.split()) for name, text in WORDS.items()}
    return template.format(**numbers, **words)
