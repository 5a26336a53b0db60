# SPDX-License-Identifier: Apache-2.0
"""The part of preflight that is about rows: they can be read, and something comes of enough of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from shared.conversations.reader import LEFT_OUT, TOO_LONG
from shared.paths import find_input, places
from shared.runtime.wording import listed
from shared.target.special_tokens import REASON as SPECIAL_TOKEN
from stages.ops.chain.processes import Step
from stages.ops.chain.rows import Look, Looks
from stages.ops.chain.served import problem

_FORMS = "synth's README names the forms that a row may have; `columns` maps other names."
# What is to be done about rows without the answers that a stage takes from them.
_ANSWERS = {
    "keep": "Give rows with answers, or have the target answer: mode: regenerate.",
    "complete": "Give rows with every answer but the last, or set mode: regenerate.",
    "conversations": "Give rows with answers, or have synth answer them.",
}
_LACKS_ANSWERS = {"no_answer", "unanswered_turn", LEFT_OUT}
# What is to be done about rows that the target cannot be asked.
_UNASKED = {
    TOO_LONG: "Give shorter prompts, or raise run.max_length_tokens.",
    SPECIAL_TOKEN: "Take the control tokens out of the text, or set special_token_text: allow.",
}
_MANY = 0.1  # so large a share left out is worth a warning


def input_problems(step: Step, looks: Looks, workspace: Path) -> Iterator[str]:
    """Why what a stage reads from outside the run is nothing to work on; a hub is not asked."""
    found = looks.of(step)
    is_some = any(isinstance(each, Look) and each.usable for each in found)
    for each in found:
        if not isinstance(each, Look):
            yield str(each)
        elif not (is_some and each.is_left_out):  # the other sources have rows
            yield from _of_look(each)
    if (states := step.settings.get("states")) and find_input(states, workspace) is None:
        expected = f"a folder at {places(states, workspace)}"
        yield problem("dump.states", expected, "none", "Mount it.")


def _of_look(look: Look) -> Iterator[str]:
    """Why nothing comes of a source's rows, or too little."""
    is_too_little = look.is_whole and look.failed > look.limit * look.rows
    if look.usable and not is_too_little:
        return
    why = listed(look.reasons, 3)
    yield problem(
        look.label,
        f"at most {look.limit:.0%} of the rows unusable"
        if look.usable
        else "rows that can be used",
        f"{look.failed:,} of {look.rows:,} ({why})"
        if look.usable
        else f"none ({why or 'it is empty'})",
        _remedy(look),
    )


def _remedy(look: Look) -> str:
    if _LACKS_ANSWERS & look.reasons.keys():
        return _ANSWERS[look.mode]
    return " ".join(_UNASKED[reason] for reason in _UNASKED if reason in look.reasons) or _FORMS


def row_warnings(steps: Sequence[Step], looks: Looks) -> Iterator[str]:
    """Where many rows of a source are left out: what is left may be too little to train on."""
    for step in steps:
        found = [] if step.done else looks.of(step)
        is_some = any(
            isinstance(each, Look) and each.usable for each in found
        )  # else it is refused
        for look in found if is_some else ():
            if isinstance(look, Look) and look.rows and look.left <= 1 - _MANY:
                yield (
                    f"{look.label}: nothing comes of {1 - look.left:.0%} of the prompts: "
                    f"{listed(look.reasons, 3)}, of {look.rows:,} rows looked at. {_remedy(look)}"
                )
