# SPDX-License-Identifier: Apache-2.0
"""What `--help` prints: the fields of a command's configuration, in groups, with their choices."""

import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo

from shared.config import CommandConfig, RunConfig, Section, StageConfig, kind_of
from shared.settings import flag_fields

_WIDTH = 100
_INDENT = 8
_EXIT_CODES = "0 done, 1 bug, 2 your input, 3 output failed its checks, 75 try again, 143 stopped"
_LIST = ",..."
_KINDS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


def help_text(
    stage: str, commands: Mapping[str, tuple[type[CommandConfig], str]], command: str
) -> str:
    """The help page of one command."""
    config = commands[command][0]
    words = [f"<{name}>" for name in config.positional]
    words += [f"[<{config.variadic}> ...]"] if config.variadic else []
    lines = [" ".join([f"python -m stages.{stage} {command}", *words, "[--flag value ...]"]), ""]
    lines += [inspect.cleandoc(config.__doc__ or ""), ""]
    others = [name for name in commands if name != command]
    if others:
        lines += [f"Other commands: {', '.join(others)}. Each has its own --help.", ""]
    fields = flag_fields(config)
    if issubclass(config, StageConfig):
        lines.append("A flag overrides the recipe, the recipe overrides the default.")
    if any(_changes_result(field) for field in fields.values()):
        lines.append("* changes the result.")
    if any(_value(field.annotation).endswith(_LIST) for field in fields.values()):
        lines.append("A list is written A,B.")
    if not config.lists_all:
        lines.append("What else it needs to know is read from the recipe.")
    for heading, names in _groups(config):
        lines += ["", f"{heading}:"]
        for name in names:
            lines += _flag(name, fields[name])
    lines += ["", "--print_config prints the resolved configuration as JSON and runs nothing."]
    return "\n".join([*lines, f"Exit codes: {_EXIT_CODES}."])


def _groups(config: type[CommandConfig]) -> Iterator[tuple[str, list[str]]]:
    """(heading, flags): the command's own groups, the rest of its flags, the run's."""
    is_stage = issubclass(config, StageConfig)
    shared = list(RunConfig.model_fields) if is_stage else []
    rest = [name for name in flag_fields(config) if name not in shared]
    if not config.lists_all:
        rest = ["workspace", "recipe"]
    for heading, text in config.groups.items():
        names = text.split()
        rest = [name for name in rest if name not in names]
        yield heading, names
    yield ("Invocation" if config.groups else "Flags"), rest
    if shared:
        yield "Run (the recipe's section run: the same in every stage)", shared


def _flag(name: str, field: FieldInfo) -> list[str]:
    star = "*" if _changes_result(field) else " "
    default = field.get_default(call_default_factory=True, validated_data={})
    text = (field.description or "").rstrip(".") + "."
    if field.is_required():
        text += " [required]"
    elif default is not None or "default" not in text.lower():  # else the text says it
        text += f" [default: {_shown(default)}]"
    pad = " " * _INDENT
    body = textwrap.wrap(text, _WIDTH, initial_indent=pad, subsequent_indent=pad)
    return [f"  {star} --{name} {_value(field.annotation)}", *body]


def _changes_result(field: FieldInfo) -> bool:
    return kind_of(field) == "identity"


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "none"
    return "none" if default in (None, {}) else str(default)


def _value(annotation: Any) -> str:
    """How a value of this type is written, such as `a|b` or `INTEGER`."""
    if annotation is bool:
        return "[true|false]"
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if origin in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        return "|".join(dict.fromkeys(map(_value, parts)))
    if origin is typing.Annotated:
        return _value(typing.get_args(annotation)[0])
    if origin is dict:
        return "'{KEY: VALUE}'"
    if origin in (list, tuple):
        item = typing.get_args(annotation)[0]
        is_mapping = isinstance(item, type) and issubclass(item, Section)
        return "'[{KEY: VALUE}]'" if is_mapping else _value(item) + _LIST
    return _KINDS.get(annotation, "TEXT")
