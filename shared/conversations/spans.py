# SPDX-License-Identifier: Apache-2.0
"""Token ids of a finished conversation, and the ranges of them that the assistant said.

A span holds what the target would have generated: the answer's text, the marks around its reasoning and
tool calls, and the token that ends its turn. What the template adds (headers, an empty thinking block,
the line end or the final token after a turn's end) is context. Each span is proved twice: as text,
against a rendering with placeholders (`placeholders.py`); as tokens, by decoding it again.

Worked example, a template `<user>q<end><assistant>a<end>` of one token a piece:

    whole conversation   <user> q <end> <assistant> a <end>      ids 1 10 2 3 20 2
    span                                            a <end>      [4, 6)
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence, Set
from typing import Any

from shared.conversations.arguments import all_arguments_end
from shared.conversations.call_ids import with_call_ids
from shared.conversations.encoding import Characters, Span, encoded
from shared.conversations.filler import require_no_filler
from shared.conversations.placeholders import Located, Piece, locate, replaced, require_all
from shared.conversations.template import (
    ChatTemplate,
    Shape,
    TemplateMismatch,
    TemplateRefusal,
    common_length,
    shapes_for,
)
from shared.prompts.rows import Message

_PROBE = "Zq0y0qZ"


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """Some messages as token ids, and the half-open ranges that the assistant said."""

    messages: tuple[Message, ...]
    input_ids: tuple[int, ...]
    spans: tuple[Span, ...]


def tokenize(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Any] = (),
    *,
    train_reasoning: bool = True,
    context: Set[int] = frozenset(),
) -> list[Tokenized]:
    """A finished conversation as one row, or as one row per answer.

    One row per answer where the template shows an earlier answer, or what precedes it, otherwise
    than it did when that answer was given (reasoning is dropped from history): each was said so.

    Args:
        context: indices of answers that are not trained on; what follows the last trained one is cut.

    Raises:
        TemplateMismatch: for an answer, naming it: no row of the conversation can be trusted.
    """
    answers = [
        index
        for index, each in enumerate(messages)
        if each["role"] == "assistant" and index not in context
    ]
    if not answers:
        raise TemplateMismatch("the conversation has no answer")
    tokenized = functools.partial(_in_some_shape, template, messages, tools, train_reasoning)
    try:
        return [tokenized(answers, may_search=False)]
    except TemplateMismatch:
        return [tokenized([index], may_search=True) for index in answers]


def _in_some_shape(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Any],
    train_reasoning: bool,
    answers: Sequence[int],
    *,
    may_search: bool,
) -> Tokenized:
    messages = messages[: answers[-1] + 1]
    problem: TemplateMismatch | None = None
    shapes = list(shapes_for(messages, asks_for_none=template.asks_for_none(tools)))
    for given, shape in itertools.product(with_call_ids(messages), shapes):
        try:
            rendering = _Rendering(template, tuple(given), tuple(tools), shape, train_reasoning)
            return rendering.tokenized(answers, may_search=may_search)
        except TemplateMismatch as error:
            # The usual form's is the one to tell, of those that the template takes.
            if problem is None or (
                isinstance(problem, TemplateRefusal) and not isinstance(error, TemplateRefusal)
            ):
                problem = error
    raise problem or TemplateMismatch("the conversation has no messages")


class _Rendering:
    """One conversation in one form."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: tuple[Message, ...],
        tools: tuple[Any, ...],
        shape: Shape,
        train_reasoning: bool,
    ) -> None:
        self.template, self.messages, self.tools, self.shape = template, messages, tools, shape
        self.train_reasoning = train_reasoning
        self.whole = self._render(messages)

    @property
    def _ends(self) -> frozenset[str]:
        return self.template.end_tokens(self.shape.as_parts, bool(self.tools))

    def _render(self, messages: Sequence[Message], *, asking: bool = False) -> str:
        return self.template.render(messages, self.tools, shape=self.shape, asking=asking)

    def tokenized(self, answers: Sequence[int], *, may_search: bool) -> Tokenized:
        """Ids and spans of these answers.

        Raises:
            TemplateMismatch: an answer is not shown whole, or its tokens are not its own.
        """
        located = self._located(answers)
        spans: list[Characters] = []
        for index in answers:
            own = [each for each in located if each.piece.message == index]
            # A tool's result may repeat the name of its call.
            own = [
                each for n, each in enumerate(own) if each.piece not in [o.piece for o in own[:n]]
            ]
            later = [each.start for each in located if each.piece.message > index]
            limit = min(later, default=len(self.whole))
            spans.append(self._span(index, own, limit, may_search=may_search))
            if len(spans) > 1 and spans[-1].start < spans[-2].end:
                raise TemplateMismatch(f"message {index} does not follow the answer before it")
        return Tokenized(self.messages, *encoded(self.template, self.whole, spans))

    def _located(self, answers: Sequence[int]) -> list[Located]:
        changed, pieces = replaced(self.messages, answers, self.whole)
        try:
            skeleton = self._render(changed)
            located = locate(skeleton, self.whole, pieces)
        except TemplateMismatch:
            if any(piece.kind != "content" for piece in pieces.values()):
                raise
            return [self._after_prompt(piece) for piece in pieces.values()]
        require_all(pieces, located, reasoning=self.train_reasoning)
        return located

    def _after_prompt(self, piece: Piece) -> Located:
        """A content that stands just after what precedes it: for templates that look into it."""
        start = self._prompt_end(piece.message)
        if start is None:
            raise TemplateMismatch(f"{piece} is shown otherwise than it was given")
        plain, _ = self._around_plain_answer(piece.message)
        start = max(start, len(plain) if self.whole.startswith(plain) else 0)
        for text in (piece.text, piece.text.strip()):
            index = self.whole.find(text, start)
            if index >= 0 and not self.whole[start:index].strip():
                return Located(piece, index, index + len(text))
        raise TemplateMismatch(f"{piece} is shown otherwise than it was given")

    def _prompt_end(self, index: int) -> int | None:
        """Where the engine's prompt for this answer ends, if the text begins with that prompt."""
        asked = self._render(self.messages[:index], asking=True)
        return len(asked) if self.whole.startswith(asked) else None

    def _header(self, index: int) -> str:
        """What the template adds when it asks for this answer."""
        asked = self._render(self.messages[:index], asking=True)
        return asked[common_length(asked, self._render(self.messages[:index])) :]

    def _header_end(self, index: int, before: int) -> int | None:
        """One past this answer's header, which ends before `before`; None if it is not there."""
        header = self._header(index)
        previous = common_length(self.whole, self._render(self.messages[:index]))
        at = self.whole.rfind(header, previous, before) if header else -1
        said = self.messages[index - 1]["content"].strip()
        if said and said in self.whole[at:before]:  # an earlier answer's header
            return None
        return at + len(header) if at >= 0 else None

    def _around_plain_answer(self, index: int) -> tuple[str, str]:
        """The text before and after a plain answer in this answer's place; '' if it is not shown."""
        probe = {"role": "assistant", "content": _PROBE}
        before, _, after = self._render([*self.messages[:index], probe]).partition(_PROBE)
        return ("", "") if _PROBE in after else (before, after)

    def _span(
        self, index: int, located: Sequence[Located], limit: int, *, may_search: bool
    ) -> Characters:
        trained = [
            each for each in located if each.piece.kind != "reasoning" or self.train_reasoning
        ]
        if not trained:
            raise TemplateMismatch(f"message {index} says nothing")
        message = self.messages[index]
        # Where the template asks for None, both cases may look quite different.
        if not message["content"].strip() and not self.shape.empty_as_none:
            require_no_filler(self._render, self.messages[:index], message)
        prompt_end = self._prompt_end(index)
        if prompt_end is None and not may_search:
            raise TemplateMismatch(f"message {index} is shown otherwise than when it was given")
        if prompt_end is None:
            prompt_end = self._header_end(index, located[0].start)
        if prompt_end is not None and prompt_end > located[0].start:
            raise TemplateMismatch(f"message {index} begins within the prompt for it")
        start = self._start(index, located, trained, prompt_end)
        return Characters(index, start, self._end(index, trained, start, limit), prompt_end)

    def _start(
        self,
        index: int,
        located: Sequence[Located],
        trained: Sequence[Located],
        prompt_end: int | None,
    ) -> int:
        lead = trained[0]
        if lead is not located[0] or lead.piece.kind == "content":
            if any(each.start > lead.start for each in located if each not in trained):
                raise TemplateMismatch(f"message {index}: its reasoning follows its answer")
            masked = located[0] if lead.piece.kind == "name" and lead is not located[0] else None
            return self._after_reasoning(index, masked, lead) if masked else lead.start
        plain, _ = self._around_plain_answer(index)
        if plain and self.whole.startswith(plain):
            return max(len(plain), prompt_end or 0)
        if prompt_end is None:
            raise TemplateMismatch(f"{lead.piece}: the template does not show where that begins")
        if not self._header(index):  # it is still to come
            common = common_length(self.whole, plain)
            return max(prompt_end, self.template.token_edge(self.whole, common))
        return prompt_end

    def _after_reasoning(self, index: int, masked: Located, lead: Located) -> int:
        """Where a call begins that follows reasoning: after what closes that before any answer."""
        texts = {"reasoning_content": _PROBE, "content": _PROBE}
        probe = {"role": "assistant", **texts}
        parts = self._render([*self.messages[:index], probe]).split(_PROBE)
        gap = self.whole[masked.end : lead.start]
        closed = common_length(gap, parts[1]) if len(parts) == 3 else 0
        return self.template.token_edge(self.whole, masked.end + closed) if closed else lead.start

    def _end(self, index: int, trained: Sequence[Located], start: int, limit: int) -> int:
        if self.messages[index].get("tool_calls"):
            return self._end_of_calls(index, trained, start, limit)
        last = trained[-1].end
        token = self.template.token_at(self.whole, last)
        if token in self._ends:
            return self._after_ends(self.whole.index(token, last) + len(token))
        if self._ends:
            after = self.whole[last : last + 20]
            raise TemplateMismatch(f"message {index}: {after!r} stands between it and its end")
        return last

    def _after_ends(self, end: int) -> int:
        """One past the tokens that end every answer together with the one before `end`."""
        more = self.template.further_ends(self.shape.as_parts, bool(self.tools))
        return end + len(more) if self.whole.startswith(more, end) else end

    def _end_of_calls(self, index: int, trained: Sequence[Located], start: int, limit: int) -> int:
        shown = self._render(self.messages[: index + 1])
        is_prefix = self.whole.startswith(shown)
        stop = min(limit, len(shown)) if is_prefix else limit
        calls = self.messages[index]["tool_calls"]
        named = (each for each in trained if each.piece.kind == "name")
        names = [(e.start, e.end) for e in sorted(named, key=lambda each: each.piece.call)]
        try:
            last = all_arguments_end(self.whole, calls, names, start, stop)
        except TemplateMismatch as mismatch:
            raise TemplateMismatch(f"message {index}: {mismatch}") from mismatch
        last = max(last, *(each.end for each in trained))
        ends = [at + len(t) for t in self._ends if (at := self.whole.find(t, last, stop)) >= 0]
        if not ends and is_prefix:
            tail = self.whole[last:stop]
            if not self._ends:
                _, after = self._around_plain_answer(index)
                return last + len(tail.removesuffix(after).rstrip())
            tail = self.template.before_header(tail, self.shape.as_parts, bool(self.tools))
            special = [tail.rindex(t) + len(t) for t in self.template.special if t in tail]
            return last + max(special, default=len(tail.rstrip()))
        following = [each["content"].strip() for each in self.messages[index + 1 : index + 2]]
        if not ends or any(text and text in self.whole[last : min(ends)] for text in following):
            raise TemplateMismatch(f"message {index}: its tool calls have no end")
        return self._end_before_result(index, last, self._after_ends(min(ends)))

    def _end_before_result(self, index: int, last: int, end: int) -> int:
        """One past the tokens after `last` that end a call whatever follows.

        Some families write the result into the same turn: what ends that turn ends no call.
        """
        shown = self.whole[end : len(self._render(self.messages[: index + 1]))]
        more = self.template.tokens_before_header(shown, self.shape.as_parts, bool(self.tools))
        call = self.messages[index]["tool_calls"][-1]
        result = {
            "role": "tool",
            "content": _PROBE,
            "tool_call_id": call.get("id", ""),
            "name": call["function"]["name"],
        }
        try:
            followed = self._render([*self.messages[: index + 1], result])
        except TemplateMismatch:  # it takes no results, or not that one
            return end
        said = self.whole[last:end]
        if followed.startswith(self.whole[:last]) and not followed.startswith(said, last):
            common = common_length(said, followed[last:])
            return self.template.token_edge(self.whole, last + common)
        return end + len(more) if more and said + more in followed else end
