# SPDX-License-Identifier: Apache-2.0
"""Rows of data sets whose columns and keys lose something in silence where a reader is careless."""

import json
import math
from typing import Any

import pytest

from shared.prompts.rows import Message, Unusable, parse_row

USER = {"role": "user", "content": "cat"}
CHAT = {"role": "assistant", "content": "chat"}
RESULT = {"role": "tool", "content": "dry"}


def answers(row: object) -> list[Message | None]:
    return [turn.answer for turn in parse_row(row).turns]


@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args"])
def test_a_calls_arguments_under_every_name(key: str) -> None:
    call = {"id": 7, "name": "weather", key: {"town": "Lyon"}}
    rows = [USER, {"role": "assistant", "tool_calls": [call]}, {**RESULT, "tool_call_id": 7}, CHAT]
    prompt = parse_row({"messages": rows})
    assert prompt.turns[0].answer == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "7",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"town": "Lyon"}'},
            }
        ],
    }
    assert prompt.turns[1].asked == ({**RESULT, "tool_call_id": "7"},)


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": "0"},
        {"weight": 0.0},
        {"train": False},
        {"trainable": "false"},
        {"loss_weight": 0},
        {"loss_scale": 0.0},
        {"masked": True},
        {"ignore": 1},
        {"weight": -1},
        {"train": "no"},
    ],
)
def test_an_answer_that_is_not_to_be_trained_on(mark: dict[str, object]) -> None:
    first, second = parse_row({"messages": [USER, {**CHAT, **mark}, USER, CHAT]}).turns
    assert (first.is_trained, second.is_trained) == (False, True)
    assert first.answer == second.answer == CHAT


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "completion": [CHAT], "label": False},
        {"prompt": "cat", "completion": "chat", "label": "False"},
        {"prompt": "cat", "completion": "chat", "label": 0},
        {"messages": [USER, CHAT], "kto_tag": False},
    ],
)
def test_a_bad_answer_in_every_form_of_kto(row: dict[str, object]) -> None:
    (turn,) = parse_row(row).turns
    assert (turn.answer, turn.is_trained) == (CHAT, False)


def test_a_bad_answer_of_kto_is_not_trained_on() -> None:
    (turn,) = parse_row({"prompt": "cat", "completion": "chat", "label": False}).turns
    assert not turn.is_trained
    (turn,) = parse_row({"messages": [USER, CHAT], "label": False}).turns
    assert not turn.is_trained
    (turn,) = parse_row({"prompt": "cat", "response": "chat", "label": 0}).turns
    assert turn.is_trained  # a class of something else


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"masked": True}])
def test_a_whole_row_that_is_not_to_be_trained_on(mark: dict[str, object]) -> None:
    prompt = parse_row({"messages": [USER, CHAT, USER, CHAT], **mark})
    assert [turn.is_trained for turn in prompt.turns] == [False, False]
    assert prompt.unread == ()


def test_an_item_of_question_and_answer_keeps_its_mark() -> None:
    pairs = [{"input": "cat", "output": "chat", "loss": False}, {"input": "cat", "output": "chat"}]
    first, second = parse_row({"conversation": pairs}).turns
    assert (first.is_trained, second.is_trained) == (False, True)


def test_an_answer_of_several_messages_is_read_whole() -> None:
    calling = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    for completion in ([calling, RESULT, CHAT], [USER, calling, RESULT, CHAT]):
        called, last = answers({"prompt": [USER], "completion": completion})
        assert called is not None and "tool_calls" in called
        assert last == CHAT
    system = {"role": "system", "content": "Be brief."}
    assert parse_row({"prompt": "cat", "chosen": [system, USER, CHAT]}).conversation[0] == system


def test_a_preference_without_a_prompt_is_its_whole_conversation() -> None:
    prompt = parse_row({"chosen": [USER, CHAT], "rejected": [USER, {**CHAT, "content": "chien"}]})
    assert (prompt.conversation, prompt.unread) == ((USER, CHAT), ("rejected",))


def test_columns_of_reasoning_and_of_problems() -> None:
    row = {"problem": "cat", "reasoning": "hm", "solution": "chat", "answer": "chat"}
    assert answers(row) == [{**CHAT, "reasoning_content": "hm"}]
    earlier = {"instruction": "cat", "output": "chat", "history": [USER, CHAT]}
    assert answers(earlier) == [CHAT, CHAT]
    parts = {**CHAT, "reasoning": [{"type": "text", "text": "hm"}]}
    assert answers({"messages": [USER, parts]}) == [{**CHAT, "reasoning_content": "hm"}]


@pytest.mark.parametrize("gap", [math.nan, math.inf])
def test_a_number_that_is_none_is_no_id(gap: float) -> None:
    ids = {parse_row({"id": gap, "prompt": text}).sample_id for text in ("cat", "dog")}
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"messages": [{**USER, "tools": [{"name": "f"}]}]}, "messages[].tools"),
        ({"messages": [USER, {**CHAT, "notes": [{"text": "hm"}]}]}, "messages[].notes"),
        ({"prompt": "cat", "chat_template_kwargs": {"thinking": False}}, "chat_template_kwargs"),
        ({"messages": [USER, {**CHAT, "text": "chien"}]}, "messages[].text"),
        ({"messages": [{"human": "cat", "assistant": "chat", "mood": "good"}]}, "messages[].mood"),
        ({"messages": [USER, CHAT], "loss_mask": [0, 1]}, "loss_mask"),
        ({"messages": [USER, CHAT], "weight": 0.5}, "weight other than 0 or 1"),
        ({"messages": [USER, {**CHAT, "weight": 0.5}]}, "messages[].weight other than 0 or 1"),
        ({"messages": [USER, {**CHAT, "mask": 1}]}, "messages[].mask"),
        ({"messages": [USER, CHAT], "train_on_last_turn": True}, "train_on_last_turn"),
        ({"messages": json.dumps([USER, {**CHAT, "notes": "hm"}])}, "messages[].notes"),
        ({"prompt": "cat", "completion": [{**CHAT, "notes": "hm"}]}, "messages[].notes"),
    ],
)
def test_what_is_not_read_is_named(row: object, unread: str) -> None:
    assert parse_row(row).unread == (unread,)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": {"role": ["user", "assistant"], "content": ["cat"]}}, "broken_messages"),
        ({"messages": [USER, {**CHAT, "tool_calls": [{"name": "f", "kwargs": {"a": 1}}]}]},
         "broken_tool_calls"),
        ({"messages": [USER, {**CHAT, "tool_calls": [{"name": " ", "arguments": {}}]}]},
         "broken_tool_calls"),
        ({"messages": [USER, {**CHAT, "reasoning": {"summary": "hm"}}]}, "not_text"),
        ({"prompt": "cat", "tools": [{"type": "function", "function": None}]}, "broken_tools"),
        ({"prompt": "cat", "tools": [{"type": "web_search"}]}, "broken_tools"),
        ({"prompt": "dog", "chosen": [USER, CHAT]}, "two_conversations"),
        ({"id": ["a", "b"], "prompt": ["cat", "dog"]}, "bad_id"),
        ({"messages": [USER, {**CHAT, "loss_mask": [0, 1]}]}, "partly_trained"),
        ({"messages": [USER, {**CHAT, "train_detail": [{"begin_offset": 0, "train": False}]}]},
         "partly_trained"),
        ({"messages": [USER, {**CHAT, "reasoning": "a", "thinking": "b"}]}, "two_reasonings"),
        ({"messages": [USER, {**CHAT, "content": [{"type": "text", "content": "B"}]}]}, "not_text"),
        ({"messages": [USER, {**CHAT, "content": [{"type": "text", "text": 5}]}]}, "not_text"),
        ({"prompt": "[{'role': 'user', 'content': 'cat'}]", "response": "chat"}, "printed_messages"),
        ({"prompt": "cat", "chosen": "[{'content': 'cat', 'role': 'user'}\n {'content': 'chat'}]"},
         "printed_messages"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_refused(row: object, reason: str) -> None:
    with pytest.raises(Unusable) as refusal:
        parse_row(row)
    assert refusal.value.reason == reason


@pytest.mark.parametrize("flag", ["on", "off", "High", "none"])
def test_a_column_that_says_how_much_was_thought_is_no_reasoning(flag: str) -> None:
    assert answers({"input": [USER], "output": "chat", "reasoning": flag}) == [CHAT]
    thought = {**CHAT, "reasoning_content": "on and off"}
    assert answers({"input": [USER], "output": "chat", "reasoning": "on and off"}) == [thought]


@pytest.mark.parametrize("system", ["Be brief.", [{"type": "text", "text": "Be brief."}]])
def test_a_system_column_of_text_or_of_parts(system: object) -> None:
    prompt = parse_row({"system": system, "messages": [USER, CHAT]})
    assert prompt.turns[0].asked == ({"role": "system", "content": "Be brief."}, USER)


@pytest.mark.parametrize(
    "said",
    [
        {"content": None, "refusal": "No."},
        {"content": "", "text": "No."},
        {"content": [], "refusal": "No."},
        {"content": [{"type": "refusal", "refusal": "No."}]},
        {"content": [{"type": "text", "text": {"value": "No.", "annotations": []}}]},
        {"parts": [{"text": "No."}]},
    ],
)
def test_an_answer_under_any_key_and_in_any_part(said: dict[str, object]) -> None:
    row = {"messages": [USER, {"role": "assistant", **said}]}
    assert answers(row) == [{"role": "assistant", "content": "No."}]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "reasoning", "text": "hm"},
    ],
)
def test_a_part_that_is_reasoning(part: dict[str, object]) -> None:
    parts = {"role": "assistant", "content": [part, {"type": "text", "text": "chat"}]}
    assert answers({"messages": [USER, parts]}) == [{**CHAT, "reasoning_content": "hm"}]
    late = {"role": "assistant", "content": [{"type": "text", "text": "chat"}, part]}
    with pytest.raises(Unusable, match="not_text"):
        parse_row({"messages": [USER, late]})


@pytest.mark.parametrize(
    ("result", "text"),
    [([{"temp": 3}, {"temp": 4}], '[{"temp": 3}, {"temp": 4}]'), (42, "42"), (False, "false")],
)
def test_a_tools_result_that_is_no_text_is_json(result: object, text: str) -> None:
    calling = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    tool = {"role": "tool", "content": result}
    prompt = parse_row({"messages": [USER, calling, tool, CHAT]})
    assert prompt.turns[1].asked == ({"role": "tool", "content": text},)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": json.dumps([USER]), "completion": json.dumps([CHAT])},
        {"prompt": "cat", "chosen": json.dumps([USER, CHAT])},
        {"input": json.dumps([USER]), "output": "chat"},
        {"conversation": [{"human": "cat", "assistant": "chat"}]},
        {"contents": [{"role": "user", "parts": [{"text": "cat"}]},
                      {"role": "model", "parts": [{"text": "chat"}]}]},
    ],
)  # fmt: skip
def test_messages_as_json_text_and_in_further_forms(row: dict[str, Any]) -> None:
    assert parse_row(row).turns == parse_row({"messages": [USER, CHAT]}).turns


def test_a_question_about_json_stays_a_text() -> None:
    for text in ('["a", "b"]', '[{"role": "x"', '[{"name": "cat"}]'):
        assert parse_row({"prompt": text}).messages[0]["content"] == text


@pytest.mark.parametrize(
    "row",
    [
        {"inputs": "cat", "targets": "chat"},
        {"input": "cat", "target": "chat"},
        {"turns": [{"content": "cat"}], "output": "chat"},
    ],
)
def test_a_question_and_its_answer_under_other_names(row: dict[str, object]) -> None:
    prompt = parse_row(row)
    assert prompt.turns[0].asked == (USER,)
    assert prompt.turns[0].answer == CHAT


@pytest.mark.parametrize(
    "text",
    ["\n\nHuman: cat\n\nAssistant: chat", "### User: cat\n### Assistant:"],
)
def test_a_transcript_is_not_one_question(text: str) -> None:
    with pytest.raises(Unusable, match="transcript"):
        parse_row({"prompt": text})
    parse_row({"prompt": "Human: a word for mankind"})
