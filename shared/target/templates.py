# SPDX-License-Identifier: Apache-2.0
"""A finished conversation as token ids, and which of them the assistant said.

For conversations that nobody regenerates: there is no server to tell the ids, so the target's own
chat template does. Where it marks the assistant's part (`{% generation %}`), one call gives ids and
mask. Where it does not, each turn is rendered with and without its answer, and what the answer adds
is the span; every prefix must hold as text and as tokens, else the row is refused, not guessed.

Worked example, a template `<user>q<end><assistant>a<end>` of one token a piece:

    whole conversation   <user> q <end> <assistant> a <end>      ids 1 10 2 3 20 2
    asked, with prompt   <user> q <end> <assistant>              ids 1 10 2 3
    span                                            a <end>      [4, 6)
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from shared.contracts.conversations import spans_of
from shared.prompts.rows import Message

_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


class TemplateMismatch(ValueError):
    """The template does not tell which tokens the assistant said."""


@dataclasses.dataclass(frozen=True)
class _Renderer:
    tokenizer: Any
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None

    def text(self, end: int, *, answering: bool) -> str:
        """The first `end` messages; `answering` adds what stands before an answer."""
        return str(self._apply(self.messages[:end], add_generation_prompt=answering))

    def _apply(self, messages: Sequence[Message], **how: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            list(messages), tools=self.tools, tokenize=False, **how
        )

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def marked(self) -> tuple[list[int], list[int]]:
        """Ids and mask from the template's own marks."""
        encoded = self.tokenizer.apply_chat_template(
            list(self.messages),
            tools=self.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(encoded["input_ids"]), list(encoded["assistant_masks"])


def for_template(message: Message) -> Message:
    """The message as templates expect it: a tool call's arguments as a mapping, not as JSON."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError as error:
                raise TemplateMismatch(f"a tool call's arguments are no JSON: {error}") from error
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}


def tokenize_conversation(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    *,
    last_only: bool = False,
) -> tuple[tuple[int, ...], tuple[Span, ...]]:
    """Token ids of a conversation, and the half-open ranges that the assistant said.

    Args:
        last_only: only the last answer's range; what to ask where the template shows earlier
            answers otherwise than it showed them when they were the last (dropped reasoning).

    Raises:
        TemplateMismatch: the template refuses the messages, or its prefixes do not hold.
    """
    from jinja2 import TemplateError

    shown = tuple(for_template(message) for message in messages)
    answers = [i for i, message in enumerate(shown) if message["role"] == "assistant"]
    if not answers:
        raise TemplateMismatch("the conversation has no answer")
    if last_only:
        shown, answers = shown[: answers[-1] + 1], answers[-1:]
    renderer = _Renderer(tokenizer, shown, tuple(tools) if tools else None)
    try:
        if _MARKS_ANSWERS.search(tokenizer.get_chat_template(tools=renderer.tools)):
            ids, mask = renderer.marked()
            spans = spans_of(mask)
            if len(spans) < len(answers):
                raise TemplateMismatch(f"{len(answers)} answers, {len(spans)} marked by template")
            return tuple(ids), spans[-1:] if last_only else spans
        return _by_prefixes(renderer, answers)
    # A template is a program that came with the target: it may fail like any other.
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        if isinstance(error, TemplateMismatch):
            raise
        raise TemplateMismatch(f"the template refuses the messages: {error}") from error


def _by_prefixes(
    renderer: _Renderer, answers: Sequence[int]
) -> tuple[tuple[int, ...], tuple[Span, ...]]:
    whole = renderer.text(len(renderer.messages), answering=False)
    ids = renderer.ids(whole)
    spans = []
    for turn in answers:
        asked = renderer.text(turn, answering=True)
        answered = renderer.text(turn + 1, answering=False)
        if not (answered.startswith(asked) and whole.startswith(answered)):
            raise TemplateMismatch(f"message {turn} is shown otherwise in the whole conversation")
        before, after = renderer.ids(asked), renderer.ids(answered)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise TemplateMismatch(f"message {turn}: tokens reach over the answer's edge")
        start, end = len(before), _end_of_turn(renderer.tokenizer, ids, len(before), len(after))
        if start < end:
            spans.append((start, end))
    return tuple(ids), tuple(spans)


def _end_of_turn(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> int:
    """One past the answer's last special token: what the template adds after it, nobody said."""
    special = {token_id for token_id, t in tokenizer.added_tokens_decoder.items() if t.special}
    marks = [position for position in range(start, end) if ids[position] in special]
    return marks[-1] + 1 if marks else end
