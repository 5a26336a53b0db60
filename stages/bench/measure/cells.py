# SPDX-License-Identifier: Apache-2.0
"""What is measured: the cells of a sweep, and the conversations that every cell plays.

A cell is one setting of concurrency, temperature and answer length on a running engine; K and the
drafter are the engine's own, so each of those is another engine. A conversation is a list of steps:
messages to add before the target speaks again. An MT-Bench question is two steps of one message.

Worked example: concurrency (1, 8), temperature (0,), max_tokens (256,) and K (3, 5) are two cells
on each of three engines: the baseline, the head with K = 3 and the head with K = 5.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stages.bench.config import BenchConfig

Message = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One load on an engine."""

    concurrency: int
    temperature: float
    max_tokens: int


def cells(config: BenchConfig) -> list[Cell]:
    """Every cell of the sweep; the first is the one that the gates ask."""
    axes = itertools.product(config.temperature, config.max_tokens, config.concurrency)
    return [Cell(concurrency, temperature, longest) for temperature, longest, concurrency in axes]


@dataclass(frozen=True)
class Conversation:
    """One prompt, or several that build on each other's answers."""

    id: str
    category: str
    steps: tuple[tuple[Message, ...], ...]
    tools: tuple[dict[str, Any], ...] = ()

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Conversation":
        return cls(raw["id"], raw["category"], tuple(map(tuple, raw["steps"])), tuple(raw["tools"]))

    def key(self) -> str:
        """The text of what is asked first, to tell whether two conversations begin alike."""
        return repr(self.steps[0])


def by_category(conversations: Iterable[Conversation]) -> dict[str, list[Conversation]]:
    """The conversations of each category, in order of its first appearance."""
    groups: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        groups.setdefault(conversation.category, []).append(conversation)
    return groups
