# SPDX-License-Identifier: Apache-2.0
"""What is known about other programs' failures, as data: `rules/*.yaml`, one cause and its fix each.

Our own failures need no rule: their code, problem and remedy are in the status file and in the log.
"""

import functools
import re
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from shared.errors import UserError

RULES = Path(__file__).resolve().parent / "rules"

# cause: names what went wrong. generic: a fallback, where no cause is named. consequence: reports that
# something failed, not why. benign: looks like a failure and is none.
Role = Literal["cause", "generic", "consequence", "benign"]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class When(_Strict):
    """What the run's files must say; a rule with `when` needs no `match`."""

    exit_codes: tuple[int, ...] = ()
    states: tuple[str, ...] = ()


class Rule(_Strict):
    """One way to fail, or one line that only looks like it.

    `cause` and `fix` are Jinja texts over `seen` (the expression's named groups), `stage`, `run`, and
    the functions of `wording.py`.

    Attributes:
        match: regular expression for one line, case ignored.
        near: must match in the lines around that one, or in its traceback.
        unless: must not match there.
        stages: the stages that can fail so; a log of an unknown stage does not match.
        belongs_to: the stage whose log this is, where nothing else says so.
        redo: the stage to begin again with, where it is not the one that failed.
    """

    id: str = pydantic.Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    role: Role = "cause"
    match: str = ""
    near: str = ""
    unless: str = ""
    stages: tuple[str, ...] = ()
    belongs_to: str = ""
    when: When | None = None
    cause: str
    fix: str = ""
    redo: str = ""

    @pydantic.model_validator(mode="after")
    def _is_whole(self) -> "Rule":
        if not self.match and self.when is None:
            raise ValueError("a rule needs a match, or a condition")
        if self.role != "benign" and not self.fix:
            raise ValueError("a rule that is not benign needs a fix")
        for expression in (self.match, self.near, self.unless):
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"not a regular expression: {expression}: {error}") from error
        return self

    @functools.cached_property
    def pattern(self) -> "re.Pattern[str]":
        return re.compile(self.match, re.IGNORECASE)

    def holds_in(self, surroundings: str) -> bool:
        """Whether the lines around the matched one decide for this rule."""
        if self.near and not re.search(self.near, surroundings, re.IGNORECASE):
            return False
        return not (self.unless and re.search(self.unless, surroundings, re.IGNORECASE))


def read_rules(folder: Path = RULES) -> tuple[Rule, ...]:
    """All rules of a folder, in the order of its files and of their entries.

    Raises:
        UserError: a file that is no list of rules, or an id that two rules have.
    """
    rules: dict[str, Rule] = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            entries: Any = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
            found = pydantic.TypeAdapter(list[Rule]).validate_python(entries)
        except (yaml.YAMLError, pydantic.ValidationError) as error:
            raise UserError(
                f"{path}: expected a list of failure rules: {error}", code="rules-broken"
            ) from error
        for rule in found:
            if rule.id in rules:
                raise UserError(f"{path}: rule {rule.id} is there already.", code="rules-broken")
            rules[rule.id] = rule
    return tuple(rules.values())
