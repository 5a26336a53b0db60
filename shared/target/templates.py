# SPDX-License-Identifier: Apache-2.0
"""Where a target keeps its chat templates, and which one a run uses.

In order: the recipe's `run.chat_template`; `chat_template.jinja`; `chat_template` in
`tokenizer_config.json`, one or a list of named ones; `chat_template.json` or `processor_config.json`, as
processors have it. `additional_chat_templates/<name>.jinja` adds named ones.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.config import RunConfig
from shared.errors import UserError
from shared.io.files import read_json, read_text, sha256, write_text
from shared.paths import find_input

TEMPLATE_PATTERNS = (
    "*.jinja",
    "chat_template*",
    "processor_config.json",
    "additional_chat_templates/*.jinja",
)
_DEFAULT = "default"

Template = str | dict[str, str]


def find_template(folder: Path, chosen: str | None, workspace: Path) -> Template:
    """The template's text, or the named ones where a target has several.

    Args:
        chosen: `run.chat_template`: a file, or the name of one of the target's templates.

    Raises:
        UserError: there is none, or none of that name, or several without a default.
    """
    named = dict(_named_templates(folder))
    if chosen is not None:
        path = find_input(chosen, workspace)
        if path is not None and path.is_file():
            return _template_in(path)
        if chosen in named:
            return named[chosen]
        raise UserError(
            f"run.chat_template: expected a file or one of {folder}'s templates "
            f"({', '.join(sorted(named)) or 'it has none'}), found {chosen!r}.",
            code="chat-template-not-found",
            remedy="Give the path of a Jinja file, relative to the workspace or absolute.",
            facts={"chat_template": chosen, "named": sorted(named)},
        )
    if not named:
        raise UserError(
            f"{folder}: expected a chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json), found none.",
            code="no-chat-template",
            remedy="Put the model family's template there, or set run.chat_template to its file: "
            "without one, messages cannot become tokens.",
            facts={"target": str(folder)},
        )
    if _DEFAULT not in named:
        raise UserError(
            f"{folder}: expected a default among its chat templates, found {sorted(named)} alone.",
            code="chat-template-not-chosen",
            remedy=f"Set run.chat_template to one of them, e.g. {min(named)}.",
            facts={"target": str(folder), "named": sorted(named)},
        )
    return named if len(named) > 1 else named[_DEFAULT]


def require_chat_template(
    folder: Path, chosen: str | None = None, workspace: Path = Path()
) -> None:
    """Refuse a target that cannot turn messages into tokens.

    Raises:
        UserError: as `find_template`.
    """
    find_template(folder, chosen, workspace)


def template_inputs(folder: Path, run: RunConfig, workspace: Path) -> dict[str, str]:
    """The recipe's own template as an input of an artifact: its text, wherever the file lies."""
    if run.chat_template is None:
        return {}
    path = find_input(run.chat_template, workspace)
    if path is not None and path.is_file():
        return {"chat_template": sha256(path)}
    require_chat_template(folder, run.chat_template, workspace)
    return {}  # one of the target's own: the tokenizer's hash covers it


def template_file(folder: Path, run: RunConfig, workspace: Path, into: Path) -> Path | None:
    """What vLLM's `--chat-template` needs: None where the server finds the template by itself.

    Args:
        into: file to write the template to, where it is no file of its own.
    """
    by_itself = (folder / "chat_template.jinja").exists() or "chat_template" in _json(
        folder / "tokenizer_config.json"
    )
    if run.chat_template is None and by_itself:
        return None
    path = find_input(run.chat_template, workspace) if run.chat_template else None
    if path is not None and path.is_file() and path.suffix != ".json":
        return path
    template = find_template(folder, run.chat_template, workspace)
    write_text(into, template if isinstance(template, str) else template[_DEFAULT])
    return into


def _named_templates(folder: Path) -> Iterator[tuple[str, str]]:
    """Every template by name; a later one replaces an earlier one of its name."""
    for name in ("processor_config.json", "chat_template.json", "tokenizer_config.json"):
        yield from _named(_json(folder / name).get("chat_template"))
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        yield path.stem, read_text(path)
    if (folder / "chat_template.jinja").exists():
        yield _DEFAULT, read_text(folder / "chat_template.jinja")


def _named(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and value:
        yield _DEFAULT, value
    elif isinstance(value, dict):
        yield from ((str(name), text) for name, text in value.items() if isinstance(text, str))
    elif isinstance(value, list):
        for each in value:
            if isinstance(each, dict) and isinstance(each.get("template"), str):
                yield str(each.get("name", _DEFAULT)), each["template"]


def _json(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.exists() else {}
    return value if isinstance(value, dict) else {}


def _template_in(path: Path) -> Template:
    text = read_text(path)
    if path.suffix != ".json":
        return text
    try:
        named = dict(_named(json.loads(text).get("chat_template")))
    except (ValueError, AttributeError):
        named = {}
    return named.get(_DEFAULT) or named or text
