# SPDX-License-Identifier: Apache-2.0
"""What is known about failures, as data: `rules/*.yaml`, each rule one cause and its fix.

In: the YAML files. Out: checked rules, their regular expressions compiled, and for each expression
the fixed texts without which it cannot match, which is what makes a gigabyte of log cheap to search.
All of it loads in some 50 ms. The surprise: an expression without a fixed text is refused.
"""

import functools
import re
from pathlib import Path
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any, Literal

import pydantic
import yaml

from shared.errors import UserError

RULES = Path(__file__).resolve().parent / "rules"
MIN_TEXT = 5
_MOST_ALTERNATIVES = 96

# What a stage is, as far as its files tell.
State = Literal["done", "running", "vanished", "failed", "stopped", "missing"]
# cause: names what went wrong. generic: a cause that better ones are kin to. consequence: says that
# something failed, not why. benign: looks like a failure and is none.
Role = Literal["cause", "generic", "consequence", "benign"]
Alternatives = tuple[str, ...]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class When(_Strict):
    """What must hold beside the log's lines; every field that is given."""

    exit_codes: tuple[int, ...] = ()
    states: tuple[State, ...] = ()
    recipe: dict[str, tuple[Any, ...]] = {}  # dotted key -> any of these values
    parent: tuple[State, ...] = ()  # of the stage before it in the chain


class Rule(_Strict):
    """One way to fail, or one line that only looks like it.

    `cause`, `fix` and `redo` are Jinja texts over `seen` (the expressions' named groups), `recipe(key,
    default)`, `stage` and `run`.
    """

    id: str = pydantic.Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    role: Role = "cause"
    stages: tuple[Literal["synth", "dump", "train", "bench", "ops"], ...] = ()
    lines: tuple[str, ...] = ()
    within_lines: int = 400
    when: When | None = None
    beats: tuple[str, ...] = ()  # rules that say less about the same line
    cause: str
    fix: str = ""
    redo: str = ""  # the stage to begin again with, where it is not the one that failed
    overwrite: bool = False  # what is there must be replaced
    source: str

    @pydantic.model_validator(mode="after")
    def _is_whole(self) -> "Rule":
        if not self.lines and self.when is None:
            raise ValueError("a rule needs lines, or a condition, or both")
        if self.role != "benign" and not self.fix:
            raise ValueError("a rule that is not benign needs a fix")
        for line in self.lines:
            try:
                re.compile(line, re.IGNORECASE)
            except re.error as error:
                raise ValueError(f"not a regular expression: {line}: {error}") from error
            fixed_texts(line)
        return self

    @functools.cached_property
    def patterns(self) -> tuple["re.Pattern[str]", ...]:
        return tuple(re.compile(line, re.IGNORECASE) for line in self.lines)

    @functools.cached_property
    def texts(self) -> tuple[Alternatives, ...]:
        """For each pattern, lower-case texts of which one is in every line that it matches."""
        return tuple(fixed_texts(line) for line in self.lines)


def fixed_texts(expression: str) -> Alternatives:
    r"""Texts of which at least one stands in every match of `expression`, in lower case.

    Worked example: `cannot (open|read) file \d+` gives "cannot open file " and "cannot read file ";
    `[Oo]ut of .* memory` gives "out of "; `(oom-kill|memory cgroup)` gives both.

    Raises:
        ValueError: there is no such text of `MIN_TEXT` characters.
    """
    found = _best(_parser.parse(expression, re.IGNORECASE))
    if min(map(len, found), default=0) < MIN_TEXT:
        raise ValueError(f"no fixed text of {MIN_TEXT} characters in every match of: {expression}")
    return tuple(sorted(set(found)))


def _best(sequence: Any) -> Alternatives:
    """The alternatives whose shortest is longest, of all parts that every match has."""
    candidates: list[Alternatives] = []
    run: Alternatives = ("",)
    for operation, argument in sequence:
        exact = _exact(operation, argument)
        if exact is not None and len(run) * len(exact) <= _MOST_ALTERNATIVES:
            run = tuple(left + right for left in run for right in exact)
            continue
        candidates.append(run)
        run = ("",) if exact is None else exact
        if exact is not None:
            continue
        if operation is _constants.SUBPATTERN:
            candidates.append(_best(argument[-1]))
        elif operation is _constants.BRANCH:
            branches = [_best(branch) for branch in argument[1]]
            candidates.append(tuple(text for branch in branches for text in branch or ("",)))
        elif operation in (_constants.MAX_REPEAT, _constants.MIN_REPEAT) and argument[0] > 0:
            candidates.append(_best(argument[2]))
    candidates.append(run)
    return max(candidates, key=lambda texts: min(map(len, texts), default=0))


def _exact(operation: Any, argument: Any) -> Alternatives | None:
    """All texts that a part matches, where they are few; None where they are not."""
    if operation is _constants.LITERAL:
        return (chr(argument).lower(),) if argument < 128 else None
    if operation is _constants.IN:
        parts = [_exact(*part) for part in argument]
    elif operation is _constants.SUBPATTERN:
        parts = [_exact_sequence(argument[-1])]
    elif operation is _constants.BRANCH:
        parts = [_exact_sequence(branch) for branch in argument[1]]
    elif operation is _constants.MAX_REPEAT and tuple(argument[:2]) == (0, 1):
        parts = [("",), _exact_sequence(argument[2])]
    else:
        return None
    if any(part is None for part in parts):
        return None
    texts = tuple(sorted({text for part in parts if part for text in part}))
    return texts if 0 < len(texts) <= _MOST_ALTERNATIVES else None


def _exact_sequence(sequence: Any) -> Alternatives | None:
    texts: Alternatives = ("",)
    for operation, argument in sequence:
        exact = _exact(operation, argument)
        if exact is None or len(texts) * len(exact) > _MOST_ALTERNATIVES:
            return None
        texts = tuple(left + right for left in texts for right in exact)
    return texts


def read_rules(folder: Path = RULES) -> tuple[Rule, ...]:
    """All rules of a folder, in the order of its files and of their entries.

    Raises:
        UserError: a file that is no list of rules, or an id that two rules have.
    """
    rules: dict[str, Rule] = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            entries = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
            found = pydantic.TypeAdapter(list[Rule]).validate_python(entries)
        except (yaml.YAMLError, pydantic.ValidationError) as error:
            raise UserError(f"{path}: expected a list of failure rules: {error}") from error
        for rule in found:
            if rule.id in rules:
                raise UserError(f"{path}: rule {rule.id} is there already; ids are unique.")
            rules[rule.id] = rule
    return tuple(rules.values())
