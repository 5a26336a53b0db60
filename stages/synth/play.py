# SPDX-License-Identifier: Apache-2.0
"""Plays one prompt with the target, turn by turn, and turns the result into rows.

Ids are the server's own. A conversation becomes one row where each turn's prompt begins with all ids
before it; where it does not (the template drops earlier reasoning, or tokenises an answer otherwise
than the target spelled it), every turn becomes a row of its own, for each was served just so.

Worked example, two turns: prompt ids [1, 5], answer [7, 2]; then prompt [1, 5, 7, 2, 6], answer
[8, 2]. The second prompt begins with [1, 5, 7, 2], so there is one row, [1, 5, 7, 2, 6, 8, 2], with the
spans [2, 4) and [5, 7). Had the second prompt been [1, 5, 9, 2, 6], there would be two rows:
[1, 5, 7, 2] with [2, 4) and [1, 5, 9, 2, 6, 8, 2] with [5, 7).
"""

import contextlib
import dataclasses
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from shared.contracts.conversations import Conversation, text_columns
from shared.conversations.reader import Refused
from shared.prompts.rows import Message, Prompt, Turn
from stages.synth.config import SynthConfig

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Reply:
    """The server's answer."""

    message: Message
    prompt_ids: Ids
    answer_ids: Ids
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Answered:
    """One turn as it was served: the messages up to the answer, and the reply."""

    messages: tuple[Message, ...]
    reply: Reply


@dataclasses.dataclass(frozen=True)
class Played:
    """The turns that were answered, and why it ended before its last turn ('' if it did not)."""

    turns: tuple[Answered, ...]
    ended_early: str = ""


Ask = Callable[[Sequence[Message], int], Awaitable[Reply]]


async def play(prompt: Prompt, ask: Ask, config: SynthConfig) -> Played:
    """Play every turn (`regenerate`) or only the last (`complete`).

    A later turn that cannot be asked ends the conversation; what was answered stays.

    Raises:
        Refused: the first turn cannot be answered.
    """
    if config.mode == "complete":
        if any(turn.answer is None for turn in prompt.turns[:-1]):
            raise Refused("unanswered_turn", "mode regenerate answers the turns before the last")
        reply = await ask(prompt.messages, 0)
        return Played((Answered((*prompt.messages, reply.message), reply),))
    history: list[Message] = []
    answered: list[Answered] = []
    ended = ""
    for index, turn in enumerate(prompt.turns):
        messages = _messages(turn, history)
        try:
            reply = await ask([*history, *messages], index)
        except Refused as refused:
            if not answered:
                raise
            ended = refused.reason
            break
        history += [*messages, reply.message]
        answered.append(Answered(tuple(history), reply))
        ended = _why_ended(prompt.turns, index, reply, config)
        if ended:
            break
    return Played(tuple(answered), ended)


def _messages(turn: Turn, history: Sequence[Message]) -> list[Message]:
    """The turn's messages, each tool result under the id that the target gave its call."""
    calls = iter(history[-1].get("tool_calls", ()) if history else ())
    messages = []
    for message in turn.asked:
        if message["role"] == "tool" and (call := next(calls, None)) is not None:
            message = {**message, "tool_call_id": call["id"]}
        messages.append(message)
    return messages


def _calls(message: Message | None) -> list[tuple[str, Any]]:
    """Name and arguments of each tool call, arguments as a value: spacing does not matter."""
    found = []
    for call in (message or {}).get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        with contextlib.suppress(ValueError):  # what is no JSON is compared as the text it is
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        found.append((call["function"]["name"], arguments))
    return found


def _why_ended(turns: Sequence[Turn], index: int, reply: Reply, config: SynthConfig) -> str:
    """Why the next turn cannot follow this reply; '' where it can, or where there is none."""
    if index + 1 == len(turns):
        return ""
    if reply.finish_reason == "length":
        return "length"
    recorded = _calls(turns[index].answer)
    if recorded and not config.tool_call_parser:
        return "no_tool_call_parser"
    if _calls(reply.message) != recorded:
        return "other_tool_call"
    return ""


def trained_from(answer_ids: Ids, reasoning_end: Ids, *, was_cut: bool = False) -> int:
    """Where the trained part of an answer begins when reasoning is dropped.

    After the last end-of-reasoning mark. Where there is none, 0, as nothing was reasoned; but
    nowhere in an answer that was cut, as that may be all reasoning.

    Worked example: mark (9,), answer (4, 9, 7, 2): 2; answer (4, 7): 0, and 2 if it was cut.
    """
    width = len(reasoning_end)
    if not width:
        return 0
    for end in range(len(answer_ids), width - 1, -1):
        if answer_ids[end - width : end] == reasoning_end:
            return end
    return len(answer_ids) if was_cut else 0


def _is_one(turns: Sequence[Answered]) -> bool:
    """Whether each turn's prompt begins with all ids before it."""
    before: Ids = ()
    for turn in turns:
        reply = turn.reply
        if reply.prompt_ids[: len(before)] != before:
            return False
        before = reply.prompt_ids + reply.answer_ids
    return True


def to_rows(prompt: Prompt, played: Played, *, reasoning_end: Ids = ()) -> list[Conversation]:
    """The played conversation as one row, or as one a turn; none where nothing was answered.

    Args:
        reasoning_end: the ids that end the reasoning, where it is not to be trained on.
    """
    groups = [played.turns] if _is_one(played.turns) else [(turn,) for turn in played.turns]
    rows = []
    for number, group in enumerate(groups):
        spans = []
        for turn in group:
            start, answer = len(turn.reply.prompt_ids), turn.reply.answer_ids
            was_cut = turn.reply.finish_reason == "length"
            first = start + trained_from(answer, reasoning_end, was_cut=was_cut)
            if first < start + len(answer):
                spans.append((first, start + len(answer)))
        last = group[-1]
        if not spans:
            continue
        rows.append(
            Conversation(
                sample_id=prompt.sample_id if len(groups) == 1 else f"{prompt.sample_id}/{number}",
                conversation_id=prompt.sample_id,
                source=prompt.source,
                category=prompt.category,
                messages=text_columns(last.messages),
                input_ids=last.reply.prompt_ids + last.reply.answer_ids,
                loss_spans=tuple(spans),
                # Why a conversation ended early is how it finished, on its last row.
                finish_reason=(played.ended_early if last is played.turns[-1] else "")
                or last.reply.finish_reason,
                num_prompt_tokens=len(group[0].reply.prompt_ids),
                num_completion_tokens=sum(len(turn.reply.answer_ids) for turn in group),
            )
        )
    return rows
