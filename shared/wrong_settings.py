# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a flag or a recipe's key, in plain words, and which of the two gave it."""

import dataclasses
import re
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pydantic

from shared.config import CommandConfig, RunConfig, SecretValueError, Section, StageConfig
from shared.errors import UserError, nearest
from shared.expected import expected, found, wrong


@dataclasses.dataclass(frozen=True)
class Given:
    """The values of one section, and where they come from.

    Attributes:
        flags: the names of those that flags give.
        recipe: its path, which gives the others; "" without one; None for a command that takes none.
        prefix: how a key of the section is named.
    """

    values: Mapping[str, Any]
    flags: Collection[str]
    recipe: str | None
    prefix: str = ""

    def name(self, path: Sequence[str], model: type[Section]) -> str:
        """`train.epochs`; `--shares` for a setting that a command alone has, and no recipe."""
        is_flag = self.recipe is None or path[0] in _own_flags(model)
        return ("--" if is_flag else self.prefix) + ".".join(path)

    def origin(self, names: Collection[str]) -> str:
        """Who gives these keys: `--epochs`, the recipe, or both."""
        flags = [f"--{name}" for name in names if name in self.flags]
        is_of_others = len(flags) < len(names) or not names
        others = [self.recipe or "the command line"] if is_of_others else []
        return " and ".join([*flags, *others])


def _own_flags(model: type[Section]) -> set[str]:
    """The flags of a command that its stage, and so a recipe, does not have."""
    bases = [each for each in model.__mro__ if issubclass(each, StageConfig) and each.section]
    return model.model_fields.keys() - bases[-1].model_fields.keys() if bases else set()


def refuse(error: pydantic.ValidationError, given: Given, model: type[Section]) -> UserError:
    """The refusal of a section, with a line for each setting."""
    # What a value could have been, one by one, where it may be of several kinds.
    kinds: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    listed = error.errors(include_url=False)
    for problem in listed:
        within = [each for each in listed if each["loc"][:-1] == problem["loc"]]
        if problem["type"] != "too_short" or not within:  # it counts the valid items alone
            kinds.setdefault(_path(problem, given.values), []).append(problem)
    lines = []
    for path, problems in kinds.items():
        where = given.name(path, model) if path else "settings"
        lines.append(f"{where}: {_said(path, problems, given, model)}")
    return UserError(
        "\n".join(lines),
        code="setting-invalid",
        remedy="Correct these settings in the recipe, the flags or the environment; --help explains each.",
    )


def _path(problem: Mapping[str, Any], value: Any) -> tuple[str, ...]:
    """The keys that lead to what is wrong, without pydantic's own names for the kinds of a value."""
    parts = problem["loc"]
    path = []
    for number, part in enumerate(parts):
        is_item = isinstance(part, int) and isinstance(value, list | tuple) and part < len(value)
        if is_item or (isinstance(value, Mapping) and part in value):
            value = value[part]
        elif problem["type"] != "missing" or number < len(parts) - 1:
            continue
        path.append(str(part))
    return tuple(path)


def _said(
    path: tuple[str, ...],
    problems: Sequence[Mapping[str, Any]],
    given: Given,
    model: type[Section],
) -> str:
    first, origin = problems[0], given.origin(path[:1])
    message = first["msg"].removeprefix("Value error, ")
    if not path and message.startswith("$"):
        return f"{message}."
    if not path:  # a check over several keys: the section that it saw is too much to show
        keys = [key for key in given.values if key not in ("run", "recipe", "workspace")]
        names = [key for key in keys if re.search(rf"\b{re.escape(key)}\b", message)]
        return f"{message} (from {given.origin(names)})."
    if first["type"] == "extra_forbidden":
        if len(path) == 1 and path[0] in RunConfig.model_fields:
            return f"all stages share it; move it to the section `run` of {origin}."
        return f"unknown key in {origin}. {nearest(path[-1], _known(model, path))}"
    if first["type"] == "missing":
        return f"{_needed(path, given, model)}."
    if any(isinstance(each.get("ctx", {}).get("error"), SecretValueError) for each in problems):
        return f"{message} (from {origin})."
    if len(problems) > 1 and all(map(expected, problems)):
        kinds = " or ".join(dict.fromkeys(str(expected(each)) for each in problems))
        return f"expected {kinds}, found {found(first)} (from {origin})."
    return f"{'; '.join(map(wrong, problems))} (from {origin})."


def _needed(path: tuple[str, ...], given: Given, model: type[Section]) -> str:
    if len(path) > 1:
        return f"needed (from {given.origin(path[:1])})"
    if given.recipe is None:
        is_word = issubclass(model, CommandConfig) and path[0] in model.positional
        return "needed, but " + (
            "given neither as a flag nor as a word" if is_word else "not given"
        )
    recipe = given.recipe or "a recipe (--recipe)"
    return f"needed, but neither {recipe} nor --{path[0]} gives it"


def _known(model: type[Section], path: tuple[str, ...]) -> Iterable[str]:
    """The keys that are known where the last one of a path is not."""
    for part in path[:-1]:
        if part in model.model_fields:
            model = next(_sections(model.model_fields[part].annotation), model)
    return model.model_fields


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _sections(part)
