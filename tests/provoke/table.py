# SPDX-License-Identifier: Apache-2.0
"""The table of failures: how each is provoked, and the rule that must name it."""

import dataclasses
import json
from collections.abc import Callable

from tests.provoke.world import World

ALL = ("synth", "dump", "train")


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    expect: str
    stage: str
    provoke: Callable[[World], None]
    needs: tuple[str, ...] = ()
    is_console: bool = False  # the stage keeps no log of it: what the console showed is all


CASES: list[Case] = []
Provoke = Callable[[World], None]


def case(
    name: str, expect: str, stage: str, *, needs: tuple[str, ...] = (), console: bool = False
) -> Callable[[Provoke], Provoke]:
    """Enter a function into the table; `needs` are the stages that are finished before it."""

    def keep(provoke: Provoke) -> Provoke:
        CASES.append(Case(name, expect, stage, provoke, needs, console))
        return provoke

    return keep


def conversations(world: World) -> tuple[str, str]:
    """dump's flags for a row that no synth has made."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a b"}]
    (world.workspace / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    return "--conversations", "rows.jsonl"
