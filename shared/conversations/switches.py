# SPDX-License-Identifier: Apache-2.0
"""Settings about reasoning that a target's chat template or tokenizer would ignore.

A template ignores a variable that it does not read, and vLLM says nothing: a misspelt
`enable_thinking`, or `reasoning: disable` for a target that always reasons, would change nothing and
nobody would see it. Costs milliseconds: the template is parsed, not rendered.
"""

import logging
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, meta

from shared.config import RunConfig
from shared.conversations.reader import REASONING_ENDS, begin_of
from shared.errors import UserError, nearest
from shared.target.templates import find_template

# transformers' own tag, which Jinja does not know.
_GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
_ABOUT_REASONING = re.compile("think|reason")
_ASKING = "add_generation_prompt"
_ANALYSIS = "<|channel|>analysis"
# What is always given.
_GIVEN = {_ASKING, "messages", "tools", "bos_token", "eos_token", "strftime_now", "raise_exception"}

logger = logging.getLogger(__name__)


def require_switches(folder: Path, run: RunConfig, workspace: Path) -> None:
    """Refuse variables that the run's chat template does not read.

    Raises:
        UserError: it reads no such variable, or reasons whatever the run says; or there is none.
    """
    is_disabled = run.reasoning == "disable"
    if not run.chat_template_kwargs and not is_disabled:
        return
    sources = _sources(folder, run, workspace)
    if (known := template_variables(folder, run, workspace)) is None:
        return
    if unread := sorted(run.chat_template_kwargs.keys() - known):
        raise UserError(
            f"run.chat_template_kwargs: expected variables of {folder}'s chat template, found "
            f"{', '.join(unread)}, which it does not read.",
            code="template-variable-unknown",
            remedy=nearest(unread[0], sorted(known - _GIVEN) or ["none"]),
            facts={"unread": unread, "known": sorted(known - _GIVEN)},
        )
    if not is_disabled or any(map(_ABOUT_REASONING.search, run.template_kwargs.keys() & known)):
        return
    if any(map(_always_reasons, sources)):
        raise UserError(
            f"run.reasoning: disable: {folder}'s chat template reads none of "
            f"{', '.join(run.template_kwargs)}, and the target reasons before every answer.",
            code="reasoning-not-disabled",
            remedy="Set run.reasoning to keep or drop, or run.chat_template to a template without it.",
            facts={"target": str(folder)},
        )
    if any(end in source for end in REASONING_ENDS for source in sources):
        logger.warning(
            "run.reasoning: disable: the chat template reads none of %s; if the target reasons anyway, "
            "set run.reasoning to drop",
            ", ".join(run.template_kwargs),
        )


def template_variables(folder: Path, run: RunConfig, workspace: Path) -> set[str] | None:
    """What the run's chat template reads; None of a broken one: rendering tells where.

    Raises:
        UserError: there is no such template.
    """
    try:
        return {name for each in _sources(folder, run, workspace) for name in _variables(each)}
    except TemplateError:
        return None


def _sources(folder: Path, run: RunConfig, workspace: Path) -> list[str]:
    found = find_template(folder, run.chat_template, workspace)
    return [found] if isinstance(found, str) else list(found.values())


def require_reasoning_end(tokenizer: Any, end: str, target: Path) -> None:
    """Refuse a mark that this target never writes: all of its reasoning would be trained on.

    Raises:
        UserError: the tokenizer has the mark of another family instead.
    """
    known = tokenizer.get_added_vocab()
    others = [mark for mark in REASONING_ENDS if mark in known]
    others += ["<|channel|>final<|message|>"] * ("<|channel|>" in known)
    if others and not any(token in end for token in known):
        raise UserError(
            f"synth.reasoning_end: expected what ends the reasoning of {target}, probably "
            f"{others[0]}, found {end!r}, which is no token of it.",
            code="reasoning-end",
            remedy=f"Set synth.reasoning_end to {others[0]!r}, or run.reasoning to keep.",
            facts={"reasoning_end": end, "known": others},
        )


def _variables(source: str) -> set[str]:
    parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", source))
    return meta.find_undeclared_variables(parsed)


def _always_reasons(source: str) -> bool:
    """Whether the prompt for an answer ends within reasoning, or every answer has a channel of it."""
    _, asking, tail = source.rpartition(_ASKING)
    begun = any(tail.count(begin_of(end)) > tail.count(end) for end in REASONING_ENDS)
    return bool(asking and begun) or _ANALYSIS in source
