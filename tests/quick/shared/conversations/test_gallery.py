# SPDX-License-Identifier: Apache-2.0
"""What is trained of five conversations under each family's template, to the character."""

import dataclasses
from typing import Any

import pytest
import yaml

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


def _answer_of(text: str, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **more}
