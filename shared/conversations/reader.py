# SPDX-License-Identifier: Apache-2.0
"""The one door for finished conversations: synth's mode `keep` and dump's `conversations` read here."""

import itertools
from collections.abc import Iterator, Sequence, Set
from typing import Any

from shared.config import RunConfig
from shared.contracts.conversations import Conversation, text_columns
from shared.conversations.spans import Tokenized, tokenize
from shared.conversations.template import ChatTemplate, TemplateMismatch
from shared.prompts.rows import Message, Prompt, Turn
from shared.target.special_tokens import REASON, Policy, SpecialTokens

_LONGEST_DETAIL = 300
LEFT_OUT = "answer_of_weight_0"  # the row itself says so
TOO_LONG = "too_long"  # no room for one token of an answer
# Rows that are left out on purpose; every other refusal is a failure.
SKIPPED = frozenset({TOO_LONG, LEFT_OUT, REASON})
# What ends reasoning in the text of an answer: Qwen and DeepSeek, Mistral, Seed-OSS, Command A, Kimi-VL,
# OpenThoughts, and plain mark-up.
REASONING_ENDS = (
    "</think>", "[/THINK]", "</seed:think>", "<|END_THINKING|>", "◁/think▷", "<|end_of_thought|>",
    "</thinking>", "</thought>", "</reasoning>",
)  # fmt: skip


class Refused(ValueError):
    """A conversation that cannot become rows: a short reason for the accounting, and details."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail[:_LONGEST_DETAIL]


class ConversationReader:
    """Turns rows that have their answers into token ids and loss spans.

    Args:
        tokenizer: the target's, with the chat template that the run uses.
        special_token_text: what to do with text that spells a control token.
        reasoning_end: what ends reasoning that stands in an answer's text, beside the usual marks.
    """

    def __init__(
        self,
        tokenizer: Any,
        run: RunConfig,
        special_token_text: Policy,
        reasoning_end: str = REASONING_ENDS[0],
    ) -> None:
        self._reasoning_end = reasoning_end
        self._template = ChatTemplate(tokenizer, run.template_kwargs)
        self._reasoning = run.reasoning
        self._special = SpecialTokens(tokenizer) if special_token_text == "skip" else None

    def rows(self, prompt: Prompt) -> list[Conversation]:
        """One row, or one per answer where the template shows earlier answers otherwise.

        Raises:
            Refused: with the reason; no part of the conversation is used then.
        """
        answered = answered_turns(prompt)
        messages = [
            message for turn in answered for message in (*turn.asked, turn.answer) if message
        ]
        ends = itertools.accumulate(len(turn.asked) + 1 for turn in answered)
        context = {end - 1 for end, turn in zip(ends, answered, strict=True) if not turn.is_trained}
        if self._special and (token := self._special.first_in([messages, prompt.tools])):
            # The marks around reasoning may be control tokens; the template writes them itself.
            messages = list(split_reasoning(messages, self._reasoning_end))
            if self._special.first_in([messages, prompt.tools]):
                raise Refused(REASON, token)
        try:
            parts = self._tokenized(messages, prompt.tools, context)
        except TemplateMismatch as mismatch:
            raise Refused("template_mismatch", str(mismatch)) from mismatch
        if len(parts) == 1:
            return [_row(prompt, prompt.sample_id, parts[0])]
        return [_row(prompt, f"{prompt.sample_id}/{n}", part) for n, part in enumerate(parts)]

    def _tokenized(
        self, messages: Sequence[Message], tools: Sequence[Any], context: Set[int]
    ) -> list[Tokenized]:
        split = list(split_reasoning(messages, self._reasoning_end))
        # What stands twice, in the text and beside it, is said once.
        messages = [
            each if "reasoning_content" in message else message
            for message, each in zip(messages, split, strict=True)
        ]
        if self._reasoning == "disable":
            split = [_without_reasoning(message) for message in split]
        given = messages if self._reasoning == "keep" else split
        keeps = self._reasoning == "keep"
        for index, message in enumerate(given):
            is_answer = message["role"] == "assistant" and index not in context
            if is_answer and not _says_something(message, reasoning=keeps):
                raise Refused("empty_answer", f"message {index}")
            if is_answer and not keeps and self._begins_reasoning(message["content"]):
                raise Refused("only_reasoning", f"message {index}: its reasoning has no end")
        try:
            return tokenize(self._template, given, tools, train_reasoning=keeps, context=context)
        except TemplateMismatch:
            if given == split:
                raise
            return tokenize(self._template, split, tools, train_reasoning=keeps, context=context)

    def _begins_reasoning(self, text: str) -> bool:
        marks = (self._reasoning_end, *REASONING_ENDS)
        return any(
            text.lstrip().startswith(begin_of(mark)) for mark in marks if begin_of(mark) != mark
        )


def answered_turns(prompt: Prompt) -> list[Turn]:
    """The turns with the row's own answers; what is asked after the last of them is left out.

    Raises:
        Refused: there is none, one between them has none, or none is to be trained on.
    """
    answered = [turn for turn in prompt.turns if turn.answer is not None]
    if not answered or prompt.turns[: len(answered)] != tuple(answered):
        raise Refused("no_answer", "each turn needs the row's own answer")
    if not any(turn.is_trained for turn in answered):
        raise Refused(LEFT_OUT, "no answer of the row is to be trained on")
    return answered


def split_reasoning(messages: Sequence[Message], end: str = REASONING_ENDS[0]) -> Iterator[Message]:
    """The messages, with reasoning that stands in an answer's text moved to its own key.

    `end` alone need not have a beginning in the text, which may be in the prompt for the answer.

    Raises:
        Refused: an answer has reasoning of its own beside that.
    """
    for message in messages:
        text = message["content"]
        if message["role"] == "assistant":
            may_end = () if "reasoning_content" in message else (end, REASONING_ENDS[0])
            for mark in dict.fromkeys((end, *REASONING_ENDS)):
                is_begun = text.lstrip().startswith(begin_of(mark))
                if mark in text and (is_begun or mark in may_end):
                    message = _split_at(message, mark)
                    break
        yield message


def begin_of(end: str) -> str:
    """The mark that begins reasoning, from the one that ends it."""
    for word, begin in (("/", ""), ("END_", "START_"), ("end_", "begin_")):
        if word in end:
            return end.replace(word, begin, 1)
    return end


def _split_at(message: Message, end: str) -> Message:
    reasoning, _, rest = message["content"].rpartition(end)
    reasoning = reasoning.strip().removeprefix(begin_of(end)).strip()
    own = message.get("reasoning_content", "").strip()
    if own and reasoning and own != reasoning:
        raise Refused("two_reasonings", "in an answer's text and beside it")
    more = {"reasoning_content": reasoning} if reasoning and not own else {}
    return {**message, "content": rest.strip(), **more}


def _without_reasoning(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def _says_something(message: Message, *, reasoning: bool) -> bool:
    thoughts = message.get("reasoning_content", "") if reasoning else ""
    return bool(message["content"].strip() or thoughts.strip() or message.get("tool_calls"))


def _row(prompt: Prompt, sample_id: str, part: Tokenized) -> Conversation:
    answered = sum(end - start for start, end in part.spans)
    return Conversation(
        sample_id=sample_id,
        conversation_id=prompt.sample_id,
        source=prompt.source,
        category=prompt.category,
        messages=text_columns(part.messages),
        input_ids=part.input_ids,
        loss_spans=part.spans,
        finish_reason="kept",
        num_prompt_tokens=part.spans[0][0],
        num_completion_tokens=answered,
    )
