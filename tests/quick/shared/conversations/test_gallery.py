# SPDX-License-Identifier: Apache-2.0
"""What is trained of five conversations under each family's template, to the character."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers.normalizers import NFC

from shared.config import RunConfig
from shared.conversations.reader import ConversationReader, Refused
from shared.prompts.rows import Prompt, Turn
from tests.quick.shared.conversations.gallery import FOLDER, ROWS, tokenizer_of

EXPECTED: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "expected.yaml").read_text())
# Reasoning masked, thinking switched off: what the two other settings make of two families.
SETTINGS = {
    ("qwen3", "drop", "thinking"): [["No.<|im_end|>", "Yes.<|im_end|>"]],
    ("qwen3", "disable", "thinking"): [["No.<|im_end|>"], ["Yes.<|im_end|>"]],
    ("qwen3", "disable", "multi"): [["First.<|im_end|>"], ["Second.<|im_end|>"]],
    ("qwen3.5", "disable", "plain"): [["The Rhone.<|im_end|>"]],
    ("qwen3-keeps-thinking", "drop", "thinking"): [["No.<|im_end|>", "Yes.<|im_end|>"]],
    ("gpt-oss", "drop", "thinking"): [["No.<|end|>", "Yes.<|return|>"]],
    ("chatml", "drop", "thinking"): [["No.<|im_end|>", "Yes.<|im_end|>"]],
    ("magistral", "drop", "thinking"): [["No.</s>", "Yes.</s>"]],
    ("seed-oss", "disable", "plain"): [["The Rhone.<seed:eos>"]],
}


def trained(template: str, prompt: Prompt, reasoning: str = "keep") -> Any:
    tokenizer = tokenizer_of(FOLDER / f"{template}.jinja")
    run = RunConfig.model_validate({"target": "t", "reasoning": reasoning})
    try:
        rows = ConversationReader(tokenizer, run, "skip").rows(prompt)
    except Refused as refused:
        return refused.detail
    texts = [[tokenizer.decode(row.input_ids[a:b]) for a, b in row.loss_spans] for row in rows]
    for row in rows:  # the ids are those that the template's own call gives
        assert len(row.loss_spans) > 0
        assert [span[0] for span in row.loss_spans] == sorted(span[0] for span in row.loss_spans)
    return texts


@pytest.mark.parametrize("template", sorted(EXPECTED))
def test_each_family(template: str) -> None:
    assert {name: trained(template, prompt) for name, prompt in ROWS.items()} == EXPECTED[template]


def test_every_template_has_expectations() -> None:
    assert sorted(EXPECTED) == sorted(path.stem for path in FOLDER.glob("*.jinja"))
    assert len(EXPECTED) >= 24


@pytest.mark.parametrize(("template", "reasoning", "row"), SETTINGS)
def test_reasoning_masked_or_switched_off(template: str, reasoning: str, row: str) -> None:
    expected = SETTINGS[template, reasoning, row]
    assert trained(template, ROWS[row], reasoning) == expected


def test_ids_are_those_of_the_tokenizers_own_call() -> None:
    tokenizer = tokenizer_of(FOLDER / "chatml-marked.jinja")
    (row,) = ConversationReader(tokenizer, RunConfig(target="t"), "skip").rows(ROWS["multi"])
    encoded = tokenizer.apply_chat_template(
        list(ROWS["multi"].conversation), return_dict=True, return_assistant_tokens_mask=True
    )
    assert list(row.input_ids) == encoded["input_ids"]
    assert row.loss_mask() == encoded["assistant_masks"]


@pytest.mark.parametrize("template", ["chatml", "deepseek-r1"])  # one row, and one per answer
def test_an_answer_of_weight_0_is_context(template: str) -> None:
    first, second = ROWS["multi"].turns
    untrained = dataclasses.replace(first, is_trained=False)
    prompt = dataclasses.replace(ROWS["multi"], turns=(untrained, second))
    whole = [part for row in trained(template, ROWS["multi"]) for part in row]
    assert trained(template, prompt) == [whole[1:]]
    last = dataclasses.replace(second, is_trained=False)
    assert trained(template, dataclasses.replace(prompt, turns=(first, last))) == [whole[:1]]
    nothing = dataclasses.replace(prompt, turns=(untrained, last))
    assert trained(template, nothing) == "no answer of the row is to be trained on"


def test_a_prompt_that_ends_in_a_space_is_encoded_by_itself() -> None:
    tokenizer = tokenizer_of(FOLDER / "prompt-ends-in-space.jinja")
    (row,) = ConversationReader(tokenizer, RunConfig(target="t"), "skip").rows(ROWS["plain"])
    prompt = tokenizer("User: Name a river.\nAssistant: ", add_special_tokens=False)["input_ids"]
    assert list(row.input_ids[: row.num_prompt_tokens]) == prompt


def test_arguments_in_pythons_spelling_are_not_trained() -> None:
    """The question and the answer hold the arguments' words already: those prove nothing."""
    words = {"role": "user", "content": "town town"}
    function = {"name": "town", "arguments": '{"town": "town"}'}
    calling = _answer_of(
        "town town", tool_calls=[{"id": "c", "type": "function", "function": function}]
    )
    prompt = Prompt("words", (Turn((words,), calling),))
    spans = trained("prints-arguments", prompt)
    assert spans == [['town town<tool_call>town\n{"town": "town"}</tool_call><|eos|>']]


@pytest.mark.parametrize("text", ["<think>Hm", " [THINK]Hm.", "<|START_THINKING|>Hm"])
def test_reasoning_that_was_cut_is_no_answer(text: str) -> None:
    prompt = Prompt("cut", (Turn(({"role": "user", "content": "q"},), _answer_of(text)),))
    for reasoning in ("drop", "disable"):
        assert trained("zephyr", prompt, reasoning) == "message 1: its reasoning has no end"
    assert trained("zephyr", prompt) == [[f"{text}</s>"]]


def test_reasoning_in_the_text_and_beside_it_is_said_once() -> None:
    asked = Turn(({"role": "user", "content": "q"},))
    twice = _answer_of("<think>\nHm.\n</think>\n\nNo.", reasoning_content="Hm.")
    prompt = Prompt("twice", (dataclasses.replace(asked, answer=twice),))
    (once,) = trained("qwen3", prompt)[0]
    assert once == "<think>\nHm.\n</think>\n\nNo.<|im_end|>"
    assert trained("qwen3", prompt, "drop") == [["No.<|im_end|>"]]
    other = dataclasses.replace(asked, answer={**twice, "reasoning_content": "Well."})
    told = "in an answer's text and beside it"
    assert trained("qwen3", Prompt("two", (other,))) == told


def test_a_call_after_masked_reasoning_keeps_its_marks() -> None:
    asked, last = ROWS["tools"].turns
    assert asked.answer is not None
    thought = dataclasses.replace(asked, answer={**asked.answer, "reasoning_content": "Hm."})
    prompt = dataclasses.replace(ROWS["tools"], turns=(thought, last))
    (spans,) = trained("gpt-oss", prompt, "drop")
    assert spans == trained("gpt-oss", ROWS["tools"])[0]


def test_a_call_ends_at_a_token_s_edge_before_a_result_in_its_own_turn(tmp_path: Path) -> None:
    """What ends the turn and what begins the result share their first letters, but no token."""
    written = (FOLDER / "apertus.jinja").read_text()
    marked = written.replace("'[' + m.content + ']'", "'<|assistant_result|>' + m.content")
    (tmp_path / "marked.jinja").write_text(marked)
    found = trained(str(tmp_path / "marked"), ROWS["tools"])
    assert marked != written and found == EXPECTED["apertus"]["tools"]


def test_arguments_in_a_spelling_of_their_own_reach_a_template_that_joins_them() -> None:
    asked, last = ROWS["tools"].turns
    spelled = '{ "town" : "Ly\\u006fn", "days": 2.50, "at": {"Zone": 1, "area": "x"} }'
    for raw in (spelled, json.dumps(json.loads(spelled), indent=2)):
        function = {"name": "weather", "arguments": raw}
        call = {"id": "functions.weather:0", "type": "function", "function": function}
        turn = Turn(asked.asked, _answer_of("", tool_calls=[call]))
        prompt = dataclasses.replace(ROWS["tools"], turns=(turn, last))
        (spans,) = trained("deepseek-v3", prompt)
        assert json.loads(spans[0].split("```")[1].removeprefix("json")) == json.loads(spelled)


def test_a_letter_in_two_forms_is_one_to_a_tokenizer_that_joins_them() -> None:
    tokenizer = tokenizer_of(FOLDER / "chatml.jinja")
    tokenizer.backend_tokenizer.normalizer = NFC()
    prompt = Prompt("nfd", (Turn(({"role": "user", "content": "q"},), _answer_of("cafe\u0301")),))
    (row,) = ConversationReader(tokenizer, RunConfig(target="t"), "skip").rows(prompt)
    ((start, end),) = row.loss_spans
    assert tokenizer.decode(row.input_ids[start:end]) == "caf\u00e9<|im_end|>"


def _answer_of(text: str, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **more}


def _calling(name: str, call_id: str, **more: object) -> Prompt:
    function = {"name": name, "arguments": "{}"}
    call = {"id": call_id, "type": "function", "function": function}
    result = {"role": "tool", "tool_call_id": call_id, "name": name, "content": "dry"}
    asked, last = ROWS["tools"].turns[0].asked, ROWS["tools"].turns[1].answer
    first = Turn(asked, _answer_of("", tool_calls=[call], **more))
    return Prompt("calls", (first, Turn((result,), last)), tools=ROWS["tools"].tools)


@pytest.mark.parametrize("call_id", ["call_1", "", "abcdefgh1", "f-call"])
def test_a_calls_id_is_not_taken_for_its_name(call_id: str) -> None:
    """Kimi shows the id alone, so it must spell the name; Mistral's is of nine letters or digits."""
    begin, end = "<|tool_calls_section_begin|><|tool_call_begin|>", "<|tool_call_end|>"
    call = f"{begin}functions.f:0<|tool_call_argument_begin|>{{}}{end}<|tool_calls_section_end|>"
    assert trained("kimi-k2", _calling("f", call_id)) == [
        [f"{call}<|im_end|>", "No rain.<|im_end|>"]
    ]
    assert trained("magistral", _calling("f", call_id)) == [
        ["[TOOL_CALLS]f[ARGS]{}</s>", "No rain.</s>"]
    ]


def test_two_calls_at_once_get_an_id_each() -> None:
    prompt = _calling("f", "a")
    answer, result = prompt.turns[0].answer, prompt.turns[1].asked[0]
    assert answer is not None
    calls = [{**answer["tool_calls"][0], "id": each} for each in ("a", "b")]
    turns = (
        Turn(prompt.turns[0].asked, {**answer, "tool_calls": calls}),
        Turn(({**result, "tool_call_id": "b"}, {**result, "tool_call_id": "a"}), _answer_of("Ok")),
    )
    tokenizer = tokenizer_of(FOLDER / "kimi-k2.jinja")
    reader = ConversationReader(tokenizer, RunConfig(target="t"), "skip")
    (row,) = reader.rows(Prompt("two", turns))
    text = tokenizer.decode(row.input_ids)
    assert text.index("Return of functions.f:1") < text.index("Return of functions.f:0")


def test_gpt_oss_takes_a_call_with_reasoning() -> None:
    ((call, _),) = trained("gpt-oss", _calling("f", "c", reasoning_content="Ask."))
    assert call == (
        "<|channel|>analysis<|message|>Ask.<|end|><|start|>assistant to=functions.f"
        "<|channel|>commentary json<|message|>{}<|call|>"
    )


@pytest.mark.parametrize(
    "text",
    [
        "[THINK]Hm.[/THINK]No.",
        "<seed:think>Hm.</seed:think>No.",
        "<think>Hm.</think>No.",
        "<thinking>\nHm.\n</thinking>\n\nNo.",
        "<|begin_of_thought|>Hm.<|end_of_thought|>No.",
        "<|START_THINKING|>Hm.<|END_THINKING|>No.",
        "Hm. (so far) No.",
    ],
)
def test_reasoning_in_an_answers_text_is_masked_whatever_ends_it(text: str) -> None:
    asked = ROWS["thinking"].turns[0].asked
    prompt = Prompt("inline", (Turn(asked, _answer_of(text)),))
    tokenizer = tokenizer_of(FOLDER / "chatml.jinja")
    run = RunConfig.model_validate({"target": "t", "reasoning": "drop"})
    (row,) = ConversationReader(tokenizer, run, "skip", reasoning_end="(so far)").rows(prompt)
    assert [tokenizer.decode(row.input_ids[a:b]) for a, b in row.loss_spans] == ["No.<|im_end|>"]


def test_marks_of_reasoning_that_are_control_tokens_are_written_by_the_template() -> None:
    asked = ROWS["thinking"].turns[0].asked
    prompt = Prompt("inline", (Turn(asked, _answer_of("[THINK]Hm.[/THINK]No.")),))
    assert trained("magistral", prompt) == [["[THINK]Hm.[/THINK]No.</s>"]]
    prompt = Prompt("inline", (Turn(asked, _answer_of("So [THINK] is a mark")),))
    assert trained("magistral", prompt) == "[THINK]"
