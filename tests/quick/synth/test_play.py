# SPDX-License-Identifier: Apache-2.0
"""One conversation played turn by turn, against answers that are written here."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from shared.conversations.reader import Refused
from shared.prompts.rows import Message, Prompt, parse_row
from shared.settings import build
from stages.synth.config import SynthConfig
from stages.synth.play import Played, Reply, play, to_rows, trained_from

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "recorded"}
TWO_TURNS = {"id": "x", "messages": [USER, ASSISTANT, USER, ASSISTANT]}


def call(arguments: str) -> dict[str, Any]:
    return {"id": "new", "type": "function", "function": {"name": "add", "arguments": arguments}}


def calling(arguments: str) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [call(arguments)]}


WITH_TOOL = {
    "id": "t",
    "messages": [
        USER,
        calling('{"a": 1, "b": 2}'),
        {"role": "tool", "content": "3", "tool_call_id": "old"},
        ASSISTANT,
    ],
}


def reply(prompt_ids: Sequence[int], answer_ids: Sequence[int], **changes: Any) -> Reply:
    message = changes.pop("message", {"role": "assistant", "content": "said"})
    return Reply(message, tuple(prompt_ids), tuple(answer_ids), changes.get("finish", "stop"))


def played(
    row: dict[str, Any], replies: list[Reply | Refused], **settings: str
) -> tuple[Prompt, Played, list[list[Message]]]:
    flags = {"target": "t", "prompts": "p", **settings}
    config = build(SynthConfig, flags)
    asked: list[list[Message]] = []

    async def ask(messages: Sequence[Message], turn: int) -> Reply:
        asked.append(list(messages))
        answer = replies[len(asked) - 1]
        if isinstance(answer, Refused):
            raise answer
        return answer

    prompt = parse_row(row)
    return prompt, asyncio.run(play(prompt, ask, config)), asked


def test_the_worked_example_one_row() -> None:
    replies = [reply([1, 5], [7, 2]), reply([1, 5, 7, 2, 6], [8, 2])]
    prompt, done, asked = played(TWO_TURNS, replies)
    (row,) = to_rows(prompt, done)
    assert row.input_ids == (1, 5, 7, 2, 6, 8, 2)
    assert row.loss_spans == ((2, 4), (5, 7))
    assert (row.num_prompt_tokens, row.num_completion_tokens) == (2, 4)
    assert row.sample_id == row.conversation_id == "x"
    assert [m["content"] for m in asked[1]] == ["q", "said", "q"], "on-policy, not the recorded"


def test_the_worked_example_another_spelling_gives_a_row_a_turn() -> None:
    replies = [reply([1, 5], [7, 2]), reply([1, 5, 9, 2, 6], [8, 2])]
    prompt, done, _ = played(TWO_TURNS, replies)
    first, second = to_rows(prompt, done)
    assert (first.input_ids, first.loss_spans) == ((1, 5, 7, 2), ((2, 4),))
    assert (second.input_ids, second.loss_spans) == ((1, 5, 9, 2, 6, 8, 2), ((5, 7),))
    assert (first.sample_id, second.sample_id) == ("x/0", "x/1")
    assert first.conversation_id == second.conversation_id == "x"


def test_complete_asks_once_after_the_rows_own_history() -> None:
    prompt, done, asked = played(TWO_TURNS, [reply([1, 5, 7], [8])], mode="complete")
    assert [m["content"] for m in asked[0]] == ["q", "recorded", "q"]
    assert to_rows(prompt, done)[0].loss_spans == ((3, 4),)


def test_an_answer_that_was_cut_off_ends_the_conversation() -> None:
    prompt, done, asked = played(TWO_TURNS, [reply([1], [7], finish="length")])
    assert (len(asked), done.ended_early) == (1, "length")
    assert to_rows(prompt, done)[0].finish_reason == "length"


def test_a_later_turn_that_is_refused_keeps_the_earlier_ones() -> None:
    prompt, done, _ = played(TWO_TURNS, [reply([1], [7, 2]), Refused("too_long", "")])
    assert done.ended_early == "too_long"
    assert len(to_rows(prompt, done)) == 1
    with pytest.raises(Refused):
        played(TWO_TURNS, [Refused("too_long", "")])


def test_a_call_that_matches_gets_the_recorded_result() -> None:
    same = reply([1], [7, 2], message=calling('{"b":2,"a":1}'))
    answers: list[Reply | Refused] = [same, reply([1, 7, 2, 3], [8])]
    _, done, asked = played(WITH_TOOL, answers, tool_call_parser="hermes")
    assert done.ended_early == ""
    assert asked[1][-1] == {"role": "tool", "content": "3", "tool_call_id": "new"}


@pytest.mark.parametrize(
    ("message", "parser", "reason"),
    [
        (calling('{"a": 1, "b": 3}'), "hermes", "other_tool_call"),
        ({"role": "assistant", "content": "5"}, "hermes", "other_tool_call"),
        (calling('{"a": 1, "b": 2}'), "none", "no_tool_call_parser"),
    ],
)
def test_a_call_that_cannot_be_continued_ends_it(
    message: Message, parser: str, reason: str
) -> None:
    answers: list[Reply | Refused] = [reply([1], [7, 2], message=message)]
    prompt, done, _ = played(WITH_TOOL, answers, tool_call_parser=parser)
    assert done.ended_early == reason
    (row,) = to_rows(prompt, done)
    assert (row.loss_spans, row.finish_reason) == (((1, 3),), reason)


def test_dropped_reasoning_is_context_and_not_trained_on() -> None:
    assert trained_from((4, 9, 7, 2), (9,)) == 2
    assert trained_from((4, 7), (9,)) == 0
    assert trained_from((4, 9, 9, 1, 2), (9, 1)) == 4
    prompt, done, _ = played({"id": "x", "prompt": "q"}, [reply([1, 5], [4, 9, 7, 2])])
    (row,) = to_rows(prompt, done, reasoning_end=(9,))
    assert (row.input_ids, row.loss_spans) == ((1, 5, 4, 9, 7, 2), ((4, 6),))


def test_reasoning_that_was_cut_before_its_end_trains_nothing() -> None:
    assert trained_from((4, 7), (9,), was_cut=True) == 2
    assert trained_from((4, 9, 7), (9,), was_cut=True) == 2
    assert trained_from((4, 7), (), was_cut=True) == 0, "reasoning is kept"
    question = {"id": "x", "prompt": "q"}
    for finish, answer, spans in (
        ("length", [4, 7], []),
        ("length", [4, 9, 7], [((4, 5),)]),
        ("stop", [4, 7], [((2, 4),)]),
    ):
        prompt, done, _ = played(question, [reply([1, 5], answer, finish=finish)])
        assert [row.loss_spans for row in to_rows(prompt, done, reasoning_end=(9,))] == spans
    replies = [reply([1, 5], [7, 2]), reply([1, 5, 7, 2, 6], [8, 4], finish="length")]
    prompt, done, _ = played(TWO_TURNS, replies)
    (row,) = to_rows(prompt, done, reasoning_end=(9,))
    assert row.loss_spans == ((2, 4),), "the turn before it ended by itself"


def test_an_answer_that_is_all_reasoning_gives_no_row() -> None:
    prompt, done, _ = played({"id": "x", "prompt": "q"}, [reply([1, 5], [4, 9])])
    assert to_rows(prompt, done, reasoning_end=(9,)) == []
