# SPDX-License-Identifier: Apache-2.0
"""From flags and a recipe to a validated config: flag over recipe over default.

An unknown key or flag is refused with the nearest valid name, before anything runs.
"""

import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic.fields import FieldInfo

from shared.config import CommandConfig, RunConfig, Section, StageConfig
from shared.errors import UserError, nearest
from shared.io import recipe_yaml
from shared.recipe import read_recipe
from shared.wrong_settings import Given, refuse

S = TypeVar("S", bound=Section)
C = TypeVar("C", bound=CommandConfig)


def build(config: type[C], flags: Mapping[str, str]) -> C:
    """The validated config from raw flag texts over the recipe over defaults.

    Raises:
        UserError: an unknown flag or key, or a value that does not fit.
    """
    fields = flag_fields(config)
    values: dict[str, Any] = {}
    for name, text in flags.items():
        if name not in fields:
            raise UserError(
                f"unknown flag --{name}.", code="flag-unknown", remedy=nearest(name, fields)
            )
        try:
            values[name] = _from_text(text, fields[name])
        except ValueError as error:
            raise UserError(
                f"--{name}: {error}.",
                code="flag-value",
                remedy=f"Write a list as --{name} A,B and a mapping as '{{key: value}}'.",
            ) from error
    if not issubclass(config, StageConfig):
        return _validate(config, Given(values, flags.keys(), None))
    recipe_path = values.get("recipe")
    recipe = read_recipe(Path(recipe_path)) if recipe_path else {}
    source = str(recipe_path or "")
    run_flags = {name: values.pop(name) for name in list(values) if name in RunConfig.model_fields}
    run_values = {**recipe.get("run", {}), **run_flags}
    run = _validate(RunConfig, Given(run_values, flags.keys(), source, "run."))
    section = {**recipe.get(config.section, {}), **values, "run": run}
    return _validate(config, Given(section, flags.keys(), source, f"{config.section}."))


def flag_fields(config: type[CommandConfig]) -> dict[str, FieldInfo]:
    """Every flag that a command takes: its own fields, and the run section's for a stage.

    A field whose flag is no good name in Python (`--from`, `--json`) has that as its alias.
    """
    fields = {
        field.alias or name: field for name, field in config.model_fields.items() if name != "run"
    }
    if issubclass(config, StageConfig):
        fields |= RunConfig.model_fields
    return fields


def _from_text(text: str, field: FieldInfo) -> Any:
    """A flag's text as the value that a recipe would hold: only non-scalars are YAML."""
    parts: tuple[Any, ...] = (field.annotation,)
    if typing.get_origin(field.annotation) in (types.UnionType, typing.Union):
        parts = typing.get_args(field.annotation)
    if type(None) in parts and text.lower() in ("null", "none", ""):
        return None
    if any(typing.get_origin(part) in (list, tuple, dict) for part in parts):
        try:
            value = recipe_yaml.parse(text)
        except recipe_yaml.RecipeError as error:
            raise ValueError(f"not a list or mapping: {text}") from error
        if isinstance(value, str) and "," in value:
            return [recipe_yaml.parse(item) for item in value.split(",")]
        return value if isinstance(value, list | dict) else [value]
    return text


def _validate(model: type[S], given: Given) -> S:
    try:
        return model.model_validate(given.values)
    except pydantic.ValidationError as error:
        raise refuse(error, given, model) from error
