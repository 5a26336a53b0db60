# SPDX-License-Identifier: Apache-2.0
"""A chat template with its variables: messages in, text and token ids out.

Templates differ in how they take a message: content as text or as parts, arguments of a tool call as
a mapping or as JSON text, an empty content as "" or as None, reasoning under one of three keys. A
`Shape` is one such form; a reader tries them in order and keeps the first that shows all was said.
Templates that print today's date get a fixed one: the same row must give the same ids tomorrow.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from shared.conversations.call_ids import with_call_ids
from shared.errors import FOREIGN_ERRORS
from shared.prompts.rows import Message

# Llama 3's own default, which its template prints where no date is given.
FIXED_DATE = datetime.datetime(2024, 7, 26)
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_PART = re.compile(r"""\{['"]type['"]: ?['"](?:text|thinking)['"]""")
# json.dumps' own, compact, and the indented ones of chat APIs.
_SPACINGS: tuple[dict[str, Any], ...] = (
    {}, {"separators": (",", ":")}, {"indent": 2}, {"indent": 4},
)  # fmt: skip
_PROBE = tuple(f"Zq0x{number}qZ" for number in range(4))


class TemplateMismatch(ValueError):
    """The template does not show which tokens the assistant said."""


class TemplateRefusal(TemplateMismatch):
    """The template does not take the messages at all."""


@dataclasses.dataclass(frozen=True)
class _Ends:
    """How a template ends an answer.

    Attributes:
        tokens: what ends one in the middle of a conversation, and at its end.
        further: what follows that after every answer.
        headers: what may begin the next message.
    """

    tokens: frozenset[str]
    further: str
    headers: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A form in which messages are given to the template."""

    as_parts: bool = False
    arguments_as_text: bool = False
    empty_as_none: bool = False
    one_reasoning_key: bool = False
    reasoning_as_part: bool = False  # Magistral

    def __call__(self, message: Message) -> Message:
        shaped = {key: value for key, value in message.items() if key not in REASONING_KEYS}
        if calls := message.get("tool_calls"):
            shaped["tool_calls"] = [self._call(call) for call in calls]
        if reasoning := message.get("reasoning_content"):
            if self.reasoning_as_part:
                parts = [("thinking", reasoning), ("text", message["content"])]
                content = [{"type": kind, kind: text} for kind, text in parts if text]
                return {**shaped, "content": content}
            keys = REASONING_KEYS[:1] if self.one_reasoning_key else REASONING_KEYS
            shaped |= dict.fromkeys(keys, reasoning)
        if calls and self.empty_as_none and not message["content"]:
            return {**shaped, "content": None}
        if self.as_parts:
            shaped["content"] = [{"type": "text", "text": message["content"]}]
        return shaped

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        arguments = parsed_arguments(function.get("arguments"))
        is_text = isinstance(arguments, str)
        if self.arguments_as_text and not is_text:
            arguments = arguments_text(function.get("arguments"), arguments)
        elif is_text and not self.arguments_as_text:
            raise TemplateMismatch("a tool call's arguments are no JSON object")
        return {**call, "function": {**function, "arguments": arguments}}


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences share at their beginning."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def parsed_arguments(raw: Any) -> Any:
    """A tool call's arguments as a mapping; text that is no JSON object stays text."""
    if not isinstance(raw, str):
        return {} if raw is None else raw
    try:
        value = json.loads(raw or "{}")
    except (ValueError, RecursionError):
        return raw
    return value if isinstance(value, dict) else raw


def arguments_text(raw: Any, arguments: dict[str, Any]) -> str:
    """A tool call's arguments as JSON text, spaced and escaped as `raw` is where Python can do so.

    Worked example: `{ "n" : 1.50 }` has a spelling of its own, and becomes `{"n": 1.5}`.

    Args:
        raw: what the row has, a text or not.
        arguments: what is to be spelled: the same, or other texts in their place.
    """
    original = parsed_arguments(raw)
    for spacing, ascii_only in itertools.product(_SPACINGS, (False, True)):
        if json.dumps(original, ensure_ascii=ascii_only, **spacing) == raw:
            return json.dumps(arguments, ensure_ascii=ascii_only, **spacing)
    return json.dumps(arguments, ensure_ascii=False)


def shapes_for(messages: Sequence[Message], *, asks_for_none: bool = True) -> Iterator[Shape]:
    """Every form in which these messages can be given, the usual one first."""
    has_calls = any(message.get("tool_calls") for message in messages)
    has_reasoning = any(message.get("reasoning_content") for message in messages)
    both, one = (False, True), (False,)
    choices = [both, both if has_calls else one]
    choices += [both if has_calls and asks_for_none else one]
    choices += [both if has_reasoning else one] * 2
    return itertools.starmap(Shape, sorted(itertools.product(*choices), key=sum))


class ChatTemplate:
    """The chat template of one tokenizer, rendered with the run's variables.

    Args:
        variables: `run.template_kwargs`.
    """

    def __init__(self, tokenizer: Any, variables: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self._variables = {"strftime_now": FIXED_DATE.strftime, **(variables or {})}
        added = [token for token in tokenizer.added_tokens_decoder.values() if str(token)]
        by_length = sorted({str(token) for token in added}, key=len, reverse=True)
        self._added = re.compile(r"\s*(" + ("|".join(map(re.escape, by_length)) or "(?!)") + ")")
        self.special = {str(token) for token in added if token.special}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] = (),
        *,
        shape: Shape = Shape(),
        asking: bool = False,
    ) -> str:
        """The conversation as text; `asking` adds what stands before the next answer.

        Raises:
            TemplateMismatch: the template refuses the messages, or fails on them.
        """
        from jinja2 import TemplateError

        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    [shape(message) for message in messages],
                    tools=list(tools) or None,
                    tokenize=False,
                    add_generation_prompt=asking,
                    **self._variables,
                )
            )
        # A template is a program that came with the target: it may fail like any other.
        except (TemplateError, *FOREIGN_ERRORS) as error:
            if isinstance(error, TemplateMismatch):
                raise
            raise TemplateRefusal(f"the template refuses the messages: {error}") from error
        if (shape.as_parts or shape.reasoning_as_part) and _PART.search(text):
            raise TemplateRefusal(
                "the template prints the parts of a content as Python or JSON has them"
            )
        return text

    def asks_for_none(self, tools: Sequence[Any] = ()) -> bool:
        """Whether the template tells None from an empty text."""
        source = self.tokenizer.get_chat_template(tools=list(tools) or None)
        return "none" in source.lower()

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """The tokens that an engine gets before it answers: in the first form that renders.

        Raises:
            TemplateMismatch: the template refuses the messages in every form.
        """
        problem = TemplateMismatch("no messages")
        for given, shape in itertools.product(with_call_ids(messages), shapes_for(messages)):
            try:
                return self.ids(self.render(given, tools, shape=shape, asking=True))
            except TemplateMismatch as error:
                problem = error
        raise problem

    def ids(self, text: str) -> list[int]:
        """Token ids of rendered text: the template has written the special tokens already."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """The text that token ids stand for."""
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def token_at(self, text: str, position: int) -> str:
        """The added token at `position`, after white space at most; '' if there is none."""
        match = self._added.match(text, position)
        return match[1] if match else ""

    def token_edge(self, text: str, position: int) -> int:
        """`position`, or where the added token begins that it is within."""
        spans = (match.span(1) for match in self._added.finditer(text))
        return next((start for start, end in spans if start < position < end), position)

    def end_tokens(self, as_parts: bool, has_tools: bool) -> frozenset[str]:
        """The tokens that end an answer: in the middle of a conversation, and at its end.

        Raises:
            TemplateMismatch: the template does not show a plain answer as it is.
        """
        return self._ends(as_parts, has_tools).tokens

    def further_ends(self, as_parts: bool, has_tools: bool) -> str:
        """What follows that token after every answer; '' mostly.

        Worked examples: Command A closes an answer by `<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`, ERNIE by
        `</response>`, a line end and `<|im_end|>`.

        Raises:
            TemplateMismatch: as `end_tokens`.
        """
        return self._ends(as_parts, has_tools).further

    def before_header(self, text: str, as_parts: bool, has_tools: bool) -> str:
        """`text` up to where the next message begins."""
        headers = self._ends(as_parts, has_tools).headers
        return text[
            : min((text.index(each) for each in headers if each in text), default=len(text))
        ]

    def tokens_before_header(self, text: str, as_parts: bool, has_tools: bool) -> str:
        """The added tokens that `text` begins with, without gaps, up to the next message."""
        return self._tokens_of(text, self._ends(as_parts, has_tools).headers)

    @functools.cache  # noqa: B019 - one template lives as long as its stage
    def _ends(self, as_parts: bool, has_tools: bool) -> _Ends:
        """Asked of the template by two turns of its own.

        A token that begins the next message's header ends nothing: those begin with the token of the
        assistant's header, or name a role.
        """
        shape = Shape(as_parts=as_parts)
        ask, answer, more, last = _PROBE
        texts = (("user", ask), ("assistant", answer), ("user", more), ("assistant", last))
        messages = [{"role": role, "content": content} for role, content in texts]
        tool = {"name": "probe", "description": "", "parameters": {"type": "object"}}
        tools = [{"type": "function", "function": tool}] if has_tools else []
        try:
            whole = self.render(messages, tools, shape=shape)
            asked = self.render(messages[:3], tools, shape=shape)
            header = self.render(messages[:3], tools, shape=shape, asking=True).removeprefix(asked)
        except TemplateMismatch:  # one turn is what every template takes
            whole, header = self.render(messages[:2], tools, shape=shape) + last, ""
        if whole.count(answer) != 1 or whole.count(last) != 1:
            raise TemplateMismatch("the template changes or repeats an answer of one plain word")
        tail = whole[whole.index(last) + len(last) :]
        final = self.token_at(tail, 0)
        if tail.strip() and not final and self._added.search(tail):
            raise TemplateMismatch(f"the template adds text to each answer: {tail[:40]!r}")
        after = whole.index(answer) + len(answer)
        middle = self.token_at(whole, after)
        opening = self.token_at(header, 0)
        names_role = any(role in middle.lower() for role in ("user", "human", "assistant"))
        is_header = middle != final and (opening in ("", middle) or names_role)
        headers = frozenset({opening, self._first_mark(whole)}) - {""}
        if not middle or not final or is_header:
            return _Ends(frozenset(), "", headers)  # what ends the conversation alone ends no turn
        further = tail[tail.index(final) + len(final) :]
        further = further[
            : common_length(further, whole[whole.index(middle, after) + len(middle) :])
        ]
        # An engine stops at the end-of-sequence token; white space before a further one comes otherwise.
        gaps = final != self.tokenizer.eos_token
        further = self._tokens_of(further, headers, gaps=gaps)
        return _Ends(frozenset({middle, final}), further, headers)

    def _first_mark(self, whole: str) -> str:
        """The token that begins the first message, and perhaps every other; '' if text begins it."""
        first = self.token_at(whole, 0)
        bos = self.tokenizer.bos_token
        return self.token_at(whole, whole.index(first) + len(first)) if first == bos else first

    def _tokens_of(self, text: str, stops: Set[str], *, gaps: bool = False) -> str:
        """The added tokens that `text` begins with, one after the other, up to one of `stops`.

        Args:
            gaps: whether white space may stand before each.
        """
        end = 0
        while (match := self._added.match(text, end)) and match[1] not in stops:
            if match[0] != match[1] and not gaps:
                break
            end = match.end()
        return text[:end]
