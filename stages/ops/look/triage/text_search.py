# SPDX-License-Identifier: Apache-2.0
"""Which lines of a log have a rule's text in them: all texts at once, by RE2 through pyarrow.

In: rules, and lines as pyarrow's binary values. Out: the indices of the few lines that are worth a
look by the rules' own expressions.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute

from stages.ops.look.triage.failure_rules import MIN_TEXT, Rule
from stages.ops.look.triage.log_lines import ERROR_TEXTS, MARKER_TEXTS

_SPECIAL = re.compile(r"([\\.+*?()|\[\]{}^$])")


def _any_of(texts: Collection[str]) -> str:
    """RE2's expression for a line that has one of the texts in it."""
    return "|".join(_SPECIAL.sub(r"\\\1", text) for text in sorted(texts))


def having(values: pyarrow.Array, pattern: str) -> np.ndarray:
    """Which of the lines match, as booleans."""
    options = {"pattern": pattern, "ignore_case": True}
    matched = pyarrow.compute.match_substring_regex(values, **options)
    return np.asarray(matched.to_numpy(zero_copy_only=False))


def matching(values: pyarrow.Array, pattern: str) -> tuple[np.ndarray, pyarrow.Array]:
    """(indices of the lines that match, those lines)."""
    found = np.flatnonzero(having(values, pattern))
    return found, values.take(pyarrow.array(found))


class _Search(NamedTuple):
    """RE2's expressions for a line that is worth a look, and for one with a rule's text in it."""

    pattern: str
    known: str

    @classmethod
    def of(cls, texts: Iterable[str], *, errors: bool) -> "_Search":
        known = {*texts, *MARKER_TEXTS}
        return cls(_any_of(known.union(ERROR_TEXTS) if errors else known), _any_of(known))


class Watch:
    """What is looked for: every fixed text, and the rules' patterns that each stands for."""

    def __init__(self, rules: Sequence[Rule], *, errors: bool = True) -> None:
        self.by_text: dict[str, list[tuple[Rule, int]]] = {}
        for rule in rules:
            for position, texts in enumerate(rule.texts):
                for text in texts:
                    self.by_text.setdefault(text, []).append((rule, position))
        # A line's pieces of `MIN_TEXT` characters say which texts may be in it at all.
        self.by_start: dict[str, list[str]] = {}
        for text in self.by_text:
            self.by_start.setdefault(text[:MIN_TEXT], []).append(text)
        # A rule's later lines tell nothing before its first: a log may be full of them.
        self.first = _Search.of((text for rule in rules for text in rule.texts[0]), errors=errors)
        self.whole = _Search.of(self.by_text, errors=errors)
        self.openers = _any_of({t for r in rules if len(r.texts) > 1 for t in r.texts[0]})

    def texts_in(self, line: str) -> list[str]:
        """The texts that stand in a line of lower case."""
        starts = {line[at : at + MIN_TEXT] for at in range(len(line) - MIN_TEXT + 1)}
        return [
            text
            for start in sorted(self.by_start.keys() & starts)
            for text in self.by_start[start]
            if text in line
        ]
