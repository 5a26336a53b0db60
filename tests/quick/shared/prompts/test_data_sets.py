# SPDX-License-Identifier: Apache-2.0
"""Rows of well-known data sets, in every spelling of messages, calls and reasoning."""

import pytest

from shared.prompts.content import Unusable
from shared.prompts.rows import Turn, parse_row
from tests.quick.shared.prompts.test_rows import ASSISTANT, CALLING, SYSTEM, USER


def said(row: object, **columns: str) -> list[tuple[str, str]]:
    prompt = parse_row(row, columns=columns)
    return [(message["role"], message["content"]) for message in prompt.conversation]


CAT = [("user", "cat"), ("assistant", "chat")]


BRIEF = [("system", "Be brief."), *CAT]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"system_prompt": "Be brief.", "question": "cat", "response": "chat"}, BRIEF),
        (
            {
                "system": "Be brief.",
                "conversations": [
                    {"from": "human", "value": "cat"},
                    {"from": "gpt", "value": "chat"},
                ],
            },
            BRIEF,
        ),
        (
            {"instruction": "dog", "input": "", "output": "chien", "history": [["cat", "chat"]]},
            [*CAT, ("user", "dog"), ("assistant", "chien")],
        ),
        ({"input": [{"role": "user", "content": "cat"}], "output": "chat"}, CAT),
        ({"conversation": [{"system": "Be brief.", "input": "cat", "output": "chat"}]}, BRIEF),
        (
            {"instruction": "in French", "instances": [{"input": "cat", "output": "chat"}]},
            [("user", "in French\n\ncat"), ("assistant", "chat")],
        ),
        (
            {
                "prompt": [{"role": "user", "content": "cat"}],
                "completion": [{"role": "assistant", "content": "chat"}],
            },
            CAT,
        ),
        (
            {
                "prompt": "cat",
                "chosen": [
                    {"role": "user", "content": "cat"},
                    {"role": "assistant", "content": "chat"},
                ],
            },
            CAT,
        ),
        ({"data": ["cat", "chat"]}, CAT),
        ({"messages": {"role": ["user", "assistant"], "content": ["cat", "chat"]}}, CAT),
        ([{"role": "user", "content": "cat"}, {"role": "assistant", "content": "chat"}], CAT),
        ({"prompt": ["cat", "dog"]}, [("user", "cat"), ("user", "dog")]),
        (
            {"instruction": "cat", "context": "animals", "response": "chat"},
            [("user", "cat\n\nanimals"), ("assistant", "chat")],
        ),
        ({"messages": [], "prompt": "cat", "response": "chat"}, CAT),
        (
            {
                "messages": [
                    {"role": "system", "content": ""},
                    {"role": "User", "content": [{"type": "input_text", "text": "cat"}]},
                    {"role": "bing", "text": "chat"},
                ]
            },
            CAT,
        ),
    ],
    ids=[
        "orca", "factory system", "factory history", "nemotron", "xtuner", "self-instruct", "trl",
        "preference", "ultrachat", "struct of lists", "bare list", "questions", "dolly", "empty chat",
        "spellings",
    ],
)  # fmt: skip
def test_rows_of_well_known_data_sets(row: object, expected: list[tuple[str, str]]) -> None:
    assert said(row) == expected
    assert parse_row(row).unread == ()


def test_text_that_is_not_read_is_named() -> None:
    row = {"prompt": "cat", "rubric": "be kind", "source": "web", "score": 3, "copy": "cat"}
    assert parse_row(row).unread == ("rubric",)
    assert said({**row, "prompt": "x"}, prompt="prompt", input="rubric") == [
        ("user", "x\n\nbe kind")
    ]
    message = {"role": "user", "content": "Hi", "note": "aside"}
    assert parse_row({"messages": [message]}).unread == ("messages[].note",)
    shifted = parse_row({"messages": [ASSISTANT, USER, ASSISTANT]})
    assert shifted.turns == (Turn((USER,), ASSISTANT),)
    assert shifted.unread == ("answers before the first question",)


def test_an_empty_recorded_answer_is_none_and_a_result_may_be_empty() -> None:
    empty = {"role": "assistant", "content": ""}
    assert parse_row({"messages": [USER, empty, USER, ASSISTANT]}).turns[0] == Turn((USER,))
    result = {"role": "tool", "content": "", "tool_call_id": "c1", "name": "add"}
    assert parse_row({"messages": [USER, CALLING, result]}).turns[1] == Turn((result,))


@pytest.mark.parametrize(
    "call",
    [
        {
            "role": "assistant",
            "content": "Look:",
            "function_call": {"name": "f", "arguments": "{}"},
        },
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        {"role": "assistant", "tool_calls": '[{"name": "f", "arguments": {}}]'},
    ],
)
def test_tool_calls_in_every_spelling(call: dict[str, object]) -> None:
    result = {"role": "function", "name": "f", "content": {"rain": False}}
    prompt = parse_row({"messages": [USER, call, result]})
    answer = prompt.turns[0].answer
    assert answer is not None
    assert answer["content"] == call.get("content", "")
    assert answer["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert prompt.turns[1].asked == ({"role": "tool", "content": '{"rain": false}', "name": "f"},)


def test_reasoning_in_every_spelling() -> None:
    expected = ({**ASSISTANT, "reasoning_content": "hm"},)
    for name in ("reasoning_content", "reasoning", "thinking"):
        assert (
            parse_row({"messages": [USER, {**ASSISTANT, name: "hm"}]}).conversation[1:] == expected
        )
    channels = [
        {"role": "assistant", "channel": "analysis", "content": "hm"},
        {**ASSISTANT, "channel": "final"},
    ]
    assert parse_row({"messages": [USER, *channels]}).conversation[1:] == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "image": {"bytes": b"\xff"}}, "not_text"),
        ({"system": "a", "messages": [SYSTEM, USER]}, "two_system_turns"),
        ({"instruction": "x", "history": [["only a question"]]}, "broken_history"),
        ({"text": "<|im_start|>user"}, "no_prompt"),
    ],
)
def test_what_cannot_be_read_right_is_refused(row: dict[str, object], reason: str) -> None:
    with pytest.raises(Unusable) as refusal:
        parse_row(row)
    assert refusal.value.reason == reason
