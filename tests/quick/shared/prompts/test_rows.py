# SPDX-License-Identifier: Apache-2.0
"""Rows of every shape become prompts, and every row that is none is accounted for."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.prompts.content import Unusable
from shared.prompts.rows import BadRow, Prompt, Turn, parse_row
from shared.prompts.sources import Source, read_source, without_duplicates


def read(path: Path) -> list[Prompt | BadRow]:
    return list(without_duplicates(read_source(Source(path=str(path)), path.parent)))


USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "c1"}

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

GOOD_LINES = [
    b'{"id": "a", "prompt": "Hello", "category": "greeting"}',
    b'{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}',
]
BAD_LINES = {
    b'{"prompt": "x"': "broken_json",
    b'{"prompt": ""}': "empty_content",
    b'{"prompt": 7}': "not_text",
    b'{"prompt": "\\ud800"}': "not_utf8",
    b'{"text": "x"}': "no_prompt",
    b"[1]": "not_an_object",
    b'{"prompt": "\xff"}': "not_utf8",
    b'{"messages": []}': "empty_messages",
    b'{"messages": [{"role": "wizard", "content": "x"}]}': "unknown_role",
    b'{"messages": [{"role": "assistant", "content": "x"}]}': "assistant_after_nothing",
    b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}': (
        "two_user_turns"
    ),
    b'{"messages": [{"role": "system", "content": "x"}]}': "no_user_turn",
    b'{"id": "a",  "prompt": "Hello", "category": "greeting"}': "duplicate_id",
    b'{"id": "a\\u0000b", "prompt": "x"}': "bad_id",
    b'{"prompt": "x", "tools": "{"}': "broken_tools",
    b"[" * 100_000: "broken_json",
}


def test_a_broken_line_has_its_whole_reason_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(
        b'{"prompt": "x", "id": "a\x1b[31m"}\n{"prompt": "x" "id": 1}\n{"messages": "[{"}\n\xff\n'
    )
    details = [row.detail for row in read(path) if isinstance(row, BadRow)]
    assert details == [
        "Invalid control character at: line 1 column 25 (char 24)",
        "Expecting ',' delimiter: line 1 column 16 (char 15)",
        "Expecting property name enclosed in double quotes: line 1 column 3 (char 2)",
        "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ]
    assert Unusable("x", ValueError("a\nb\x1b" + "c" * 999)).detail == r"a\nb\x1b" + "c" * 192


def test_every_line_of_a_prompts_file_is_accounted_for(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join([*GOOD_LINES, b"", *BAD_LINES]) + b"\n")
    rows = read(path)
    good = [row for row in rows if isinstance(row, Prompt)]
    bad = [row.reason for row in rows if isinstance(row, BadRow)]
    assert [row.category for row in good] == ["greeting", ""]
    assert good[0].sample_id == "a"
    assert bad == list(BAD_LINES.values())


def test_a_row_without_id_gets_a_stable_one(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n{"prompt": "y"}\n')
    first = [row.sample_id for row in read(path) if isinstance(row, Prompt)]
    path.write_bytes(b'{"prompt": "y"}\n{"prompt": "x", "category": "c"}\n')
    second = [row.sample_id for row in read(path) if isinstance(row, Prompt)]
    assert first == second[::-1]


def test_the_worked_example_of_turns() -> None:
    prompt = parse_row({"messages": [SYSTEM, USER, ASSISTANT, USER]})
    assert prompt.turns == (Turn((SYSTEM, USER), ASSISTANT), Turn((USER,), None))
    assert prompt.messages == prompt.conversation == (SYSTEM, USER, ASSISTANT, USER)


def test_what_an_engine_answers_ends_before_the_rows_own_last_answer() -> None:
    prompt = parse_row({"messages": [USER, ASSISTANT]})
    assert prompt.messages == (USER,)
    assert prompt.conversation == (USER, ASSISTANT)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"messages": json.dumps([USER, ASSISTANT])},
        {"prompt": [USER, ASSISTANT]},
        {"prompt": "Hi", "response": "Hello"},
        {"instruction": "Hi", "output": "Hello", "input": ""},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT]},
    ],
    ids=["messages", "sharegpt", "json", "chat prompt", "prompt", "alpaca", "parts"],
)
def test_one_conversation_in_every_shape(row: dict[str, object]) -> None:
    assert parse_row(row).turns == (Turn((USER,), ASSISTANT),)


def test_alpacas_input_belongs_to_the_question() -> None:
    prompt = parse_row({"instruction": "Add", "input": "1 2", "output": "3"})
    assert prompt.messages == ({"role": "user", "content": "Add\n\n1 2"},)


def test_mt_bench_has_two_turns_without_answers() -> None:
    row = {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}
    prompt = parse_row(row)
    assert (prompt.sample_id, prompt.category) == ("81", "writing")
    assert [turn.asked[0]["content"] for turn in prompt.turns] == ["Write.", "Rewrite."]
    assert all(turn.answer is None for turn in prompt.turns)


def test_a_column_map_says_where_things_are() -> None:
    row = {"q": "Hi", "a": "Hello", "kind": "chat", "key": 7, "prompt": "not this"}
    columns = {"prompt": "q", "answer": "a", "category": "kind", "id": "key"}
    prompt = parse_row(row, columns=columns)
    assert prompt.turns == (Turn((USER,), ASSISTANT),)
    assert (prompt.sample_id, prompt.category) == ("7", "chat")


def test_tool_calls_and_results_survive() -> None:
    tool = {"name": "add", "parameters": {}}
    row = {"messages": [USER, CALLING, RESULT, ASSISTANT, USER], "tools": json.dumps([tool])}
    prompt = parse_row(row)
    assert prompt.tools == ({"type": "function", "function": tool},)
    first, second, third = prompt.turns
    assert first.answer is not None
    assert first.answer["tool_calls"] == [CALL]
    assert second == Turn((RESULT,), ASSISTANT)
    assert third == Turn((USER,))


def test_a_tool_calls_arguments_may_be_a_mapping() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    prompt = parse_row({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
    answer = prompt.turns[0].answer
    assert answer is not None
    assert answer["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER, RESULT], "tool_after_user"),
        ([USER, ASSISTANT, ASSISTANT], "two_assistant_turns"),
        ([USER, SYSTEM], "system_after_user"),
        ([SYSTEM, SYSTEM, USER], "two_system_turns"),
        ([{"role": "user", "content": " "}, ASSISTANT], "empty_content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "not_text"),
    ],
)
def test_turns_that_no_template_knows_are_refused(messages: list[object], reason: str) -> None:
    with pytest.raises(Unusable) as refusal:
        parse_row({"messages": messages})
    assert refusal.value.reason == reason


def test_prompts_that_are_json_of_any_kind_never_crash_the_reader(tmp_path: Path) -> None:
    values = st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=True) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
    names = ["id", "prompt", "messages", "conversations", "turns", "tools", "category", "output"]
    message = st.dictionaries(st.sampled_from(["role", "from", "content", "tool_calls"]), values)
    keyed = st.dictionaries(st.sampled_from(names), values | st.lists(message, max_size=3))

    @settings(max_examples=100, deadline=None)
    @given(st.lists(keyed | values, max_size=5))
    @example([[None, {}]])
    def check(rows: list[object]) -> None:
        path = tmp_path / "fuzz.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        # A line by itself that lists objects is a file of rows, or one row's messages.
        only = rows[0] if len(rows) == 1 else None
        is_list = isinstance(only, list) and any(isinstance(each, dict) for each in only)
        expected = {1, len(only)} if isinstance(only, list) and is_list else {len(rows)}
        assert len(read(path)) in expected

    check()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "category": "greeting"},
        {"turns": ["a", "b"], "id": 7},
        {"messages": [SYSTEM, USER, ASSISTANT, USER]},
        {"messages": [USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT]},
        {"messages": [USER, CALLING, RESULT, ASSISTANT, USER], "tools": [ADD]},
        {"question": "2 + 2?", "answer": "4", "thinking": "Easily."},
    ],
)
def test_a_prompt_as_a_row_is_the_same_prompt(row: dict[str, Any]) -> None:
    prompt = parse_row(row)
    assert parse_row(json.loads(json.dumps(prompt.as_row()))) == prompt
