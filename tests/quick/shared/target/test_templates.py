# SPDX-License-Identifier: Apache-2.0
"""Ids and spans of kept conversations: with marks, without, and where the template cannot tell."""

import pytest
from transformers import PreTrainedTokenizerFast

from shared.target.templates import TemplateMismatch, tokenize_conversation
from tests.models import CHAT_TEMPLATE, tiny_tokenizer

MESSAGES = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi there"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
)
UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As reasoning models do: an earlier turn's reasoning is not shown any more.
FORGETFUL = UNMARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}{{ '\n' }}",
    "{{ (message['content'] if loop.last else message['content'].split('|')[-1])"
    " + '<|im_end|>' }}{{ '\n' }}",
)
CALLING = UNMARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}{{ '\n' }}",
    "{{ message['content'] }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments.items() | list }}){% endfor %}"
    "{{ '<|im_end|>\n' }}",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def said(tokenizer: PreTrainedTokenizerFast, template: str, **how: bool) -> list[str]:
    tokenizer.chat_template = template
    ids, spans = tokenize_conversation(tokenizer, MESSAGES, **how)
    return [tokenizer.decode(ids[start:end]) for start, end in spans]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, UNMARKED], ids=["marked", "unmarked"])
def test_each_answer_with_its_end_and_nothing_else(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    assert said(tokenizer, template) == ["hi there<|im_end|>", "no<|im_end|>"]
    assert said(tokenizer, template, last_only=True) == ["no<|im_end|>"]


def test_both_ways_give_the_same_ids_and_spans(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    marked = tokenize_conversation(tokenizer, MESSAGES)
    tokenizer.chat_template = UNMARKED
    assert tokenize_conversation(tokenizer, MESSAGES) == marked


def test_the_worked_example(tokenizer: PreTrainedTokenizerFast) -> None:
    """What is asked, rendered alone, ends where the span begins."""
    tokenizer.chat_template = UNMARKED
    ids, spans = tokenize_conversation(tokenizer, MESSAGES[1:3])
    asked = tokenizer.apply_chat_template(
        [MESSAGES[1]], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    answer = tokenizer("hi there<|im_end|>", add_special_tokens=False)["input_ids"]
    assert spans == ((len(asked), len(asked) + len(answer)),)
    assert ids[: spans[0][1]] == (*asked, *answer)


def test_a_template_that_forgets_reasoning_is_refused_whole_and_taken_by_turn(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = FORGETFUL
    messages = [dict(message) for message in MESSAGES]
    messages[2]["content"] = "let me think|hi there"
    with pytest.raises(TemplateMismatch, match="shown otherwise"):
        tokenize_conversation(tokenizer, messages)
    ids, spans = tokenize_conversation(tokenizer, messages[:3], last_only=True)
    assert tokenizer.decode(ids[slice(*spans[0])]) == "let me think|hi there<|im_end|>"


def test_tokens_that_reach_over_an_answers_edge_are_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """'A:' and 'B' side by side may become one token, that nobody was asked for or said."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'the' if m.role == 'user' else m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' th' }}{% endif %}"
    )
    joined = [{"role": "user", "content": "q"}, {"role": "assistant", "content": " the"}]
    assert len(tokenizer("the the")["input_ids"]) < len(tokenizer("the th")["input_ids"]) + 1
    with pytest.raises(TemplateMismatch):
        tokenize_conversation(tokenizer, joined)


def test_tool_calls_reach_the_template_as_mappings(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CALLING
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [MESSAGES[1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    ids, spans = tokenize_conversation(tokenizer, messages)
    assert tokenizer.decode(ids[slice(*spans[0])]) == "add([('a', 1)])<|im_end|>"
    call["function"] = {"name": "add", "arguments": "{"}
    with pytest.raises(TemplateMismatch, match="no JSON"):
        tokenize_conversation(tokenizer, messages)


def test_what_the_template_refuses_and_what_has_no_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = UNMARKED + "{{ raise_exception('no system please') }}"
    with pytest.raises(TemplateMismatch, match="no system please"):
        tokenize_conversation(tokenizer, MESSAGES)
    with pytest.raises(TemplateMismatch, match="no answer"):
        tokenize_conversation(tokenizer, MESSAGES[:2])
