# SPDX-License-Identifier: Apache-2.0
"""The one door for finished conversations: synth's mode `keep` and dump's `conversations` read here."""

import itertools
from collections.abc import Iterator, Sequence, Set
from typing import Any

from shared.config import RunConfig
from shared.contracts.conversations import Conversation, text_columns
from shared.conversations.spans import Tokenized, tokenize
from shared.conversations.template import ChatTemplate, TemplateMismatch
from shared.prompts.rows import Message, Prompt
from shared.target.special_tokens import REASON, Policy, SpecialTokens

_LONGEST_DETAIL = 300


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
    """

    def __init__(self, tokenizer: Any, run: RunConfig, special_token_text: Policy) -> None:
        self._template = ChatTemplate(tokenizer, run.template_kwargs)
        self._reasoning = run.reasoning
        self._special = SpecialTokens(tokenizer) if special_token_text == "skip" else None

    def rows(self, prompt: Prompt) -> list[Conversation]:
        """One row, or one per answer where the template shows earlier answers otherwise.

        Raises:
            Refused: with the reason; no part of the conversation is used then.
        """
        answered = [turn for turn in prompt.turns if turn.answer is not None]
        if not answered or prompt.turns[: len(answered)] != tuple(answered):
            raise Refused("no_answer", "each turn needs the row's own answer")
        if not any(turn.is_trained for turn in answered):
            raise Refused("answer_of_weight_0", "no answer of the row is to be trained on")
        messages = [
            message for turn in answered for message in (*turn.asked, turn.answer) if message
        ]
        ends = itertools.accumulate(len(turn.asked) + 1 for turn in answered)
        context = {end - 1 for end, turn in zip(ends, answered, strict=True) if not turn.is_trained}
        if self._special and (token := self._special.first_in([messages, prompt.tools])):
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
        split = list(split_reasoning(messages))
        if self._reasoning == "disable":
            split = [_without_reasoning(message) for message in split]
        given = messages if self._reasoning == "keep" else split
        keeps = self._reasoning == "keep"
        for index, message in enumerate(given):
            is_answer = message["role"] == "assistant" and index not in context
            if is_answer and not _says_something(message, reasoning=keeps):
                raise Refused("empty_answer", f"message {index}")
        try:
            return tokenize(self._template, given, tools, train_reasoning=keeps, context=context)
        except TemplateMismatch:
            if given == split:
                raise
            return tokenize(self._template, split, tools, train_reasoning=keeps, context=context)


def split_reasoning(messages: Sequence[Message], end: str = "</think>") -> Iterator[Message]:
    """The messages, with reasoning that stands in an answer's text moved to its own key."""
    start = end.replace("/", "", 1)
    for message in messages:
        text = message["content"]
        if message["role"] == "assistant" and end in text and "reasoning_content" not in message:
            reasoning, _, rest = text.rpartition(end)
            reasoning = reasoning.strip().removeprefix(start).strip()
            message = {**message, "content": rest.strip()}
            message |= {"reasoning_content": reasoning} if reasoning else {}
        yield message


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
