# SPDX-License-Identifier: Apache-2.0
"""Where each piece of an answer stands in the rendered text, proved by rendering twice.

The conversation is rendered as it is, and again with a placeholder for each piece that the assistant
said: reasoning, content, the name of each tool call and the texts among its arguments. Both must be
equal but for the pieces. So what the template added is known to the character, whatever it does, and
a piece that it left out, changed or cut is noticed.

Worked example: `<user>q<end><assistant>{0}<end>` against `<user>q<end><assistant>hello<end>`: piece 0
is `hello`, at characters 20 to 25.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from shared.conversations.template import TemplateMismatch, arguments_text, parsed_arguments
from shared.prompts.rows import Message


@dataclasses.dataclass(frozen=True)
class Piece:
    """Something that the assistant said.

    Attributes:
        message: index of its message.
        kind: "reasoning", "content", "name" or "argument".
        text: what was said.
        call: index of the tool call.
    """

    message: int
    kind: str
    text: str
    call: int = 0

    def __str__(self) -> str:
        what = {"name": "a tool call's name", "argument": "a tool call's arguments"}
        return f"message {self.message}: its {what.get(self.kind, self.kind)}".replace("its a", "a")


@dataclasses.dataclass(frozen=True)
class Located:
    """A piece and the characters that it takes."""

    piece: Piece
    start: int
    end: int


def replaced(
    messages: Sequence[Message], answers: Sequence[int], unlike: str
) -> tuple[list[Message], dict[str, Piece]]:
    """The messages with a placeholder for each piece of the answers, and what each stands for.

    Args:
        unlike: a text in which no placeholder may occur.
    """
    placeholders = _Placeholders(unlike)
    changed = list(messages)
    for index in answers:
        changed[index] = placeholders.message(index, messages[index])
    for index, message in enumerate(changed):
        if (call_id := message.get("tool_call_id")) in placeholders.ids:
            changed[index] = {**message, "tool_call_id": placeholders.ids[call_id]}
    return changed, placeholders.pieces


class _Placeholders:
    """Names that occur nowhere, each for one piece."""

    def __init__(self, unlike: str) -> None:
        self.pieces: dict[str, Piece] = {}
        self.ids: dict[str, str] = {}  # of calls; some families spell a call's name there alone
        self._salt = next(n for n in itertools.count() if f"Zq{n}x" not in unlike)

    def _new(self, piece: Piece) -> str:
        if not piece.text.strip():  # templates ask whether there is any
            return piece.text
        name = f"Zq{self._salt}x{len(self.pieces)}qZ"
        self.pieces[name] = piece
        return name

    def message(self, index: int, message: Message) -> Message:
        changed = dict(message)
        if reasoning := message.get("reasoning_content"):
            changed["reasoning_content"] = self._new(Piece(index, "reasoning", reasoning))
        changed["content"] = self._new(Piece(index, "content", message["content"]))
        if calls := message.get("tool_calls"):
            changed["tool_calls"] = [
                self._call(index, number, call) for number, call in enumerate(calls)
            ]
        return changed

    def _call(self, index: int, number: int, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        function["name"] = self._new(Piece(index, "name", function["name"], number))
        raw = function.get("arguments")
        arguments = parsed_arguments(raw)
        if isinstance(arguments, dict):
            replace = functools.partial(Piece, index, "argument", call=number)
            arguments = _replace_texts(arguments, lambda text: self._new(replace(text)))
            is_text = isinstance(raw, str)
            function["arguments"] = arguments_text(raw, arguments) if is_text else arguments
        changed = {**call, "function": function}
        if call_id := call.get("id"):
            name = call["function"]["name"]
            # Kimi spells a call's name in its id alone: functions.weather:0.
            as_name = rf"(?<![^.]){re.escape(name)}(?=:\d+$|$)"
            changed["id"] = self.ids[call_id] = re.sub(as_name, function["name"], call_id)
        return changed


def _replace_texts(value: Any, replace: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, dict):
        return {key: _replace_texts(each, replace) for key, each in value.items()}
    return [_replace_texts(each, replace) for each in value] if isinstance(value, list) else value


def _spellings(piece: Piece) -> Iterator[str]:
    """The ways in which a template may write a piece: trimmed, and quoted inside arguments."""
    text = piece.text
    yield from (text, text.strip(), text.lstrip(), text.rstrip())
    yield from (text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))
    if piece.kind == "argument":
        yield from (json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
        yield repr(text)[1:-1]


def locate(skeleton: str, whole: str, pieces: dict[str, Piece]) -> list[Located]:
    """Where the pieces stand in `whole`, in order.

    Raises:
        TemplateMismatch: the two differ in more than the pieces.
    """
    if not pieces:
        return []
    parts = re.split("(" + "|".join(map(re.escape, pieces)) + ")", skeleton)
    if not whole.startswith(parts[0]):
        raise TemplateMismatch("the template shows other text depending on what was said")
    position = len(parts[0])
    located: list[Located] = []
    for name, following in zip(parts[1::2], parts[2::2], strict=True):
        piece = pieces[name]
        is_last = len(located) == len(parts) // 2 - 1
        for text in _spellings(piece):
            end = position + len(text)
            fits = whole.startswith(text, position) and whole.startswith(following, end)
            if fits and (not is_last or end + len(following) == len(whole)):
                break
        else:
            raise TemplateMismatch(f"{piece} is shown otherwise than it was given")
        located.append(Located(piece, position, end))
        position = end + len(following)
    return located


def require_all(pieces: dict[str, Piece], located: Sequence[Located], *, reasoning: bool) -> None:
    """Refuse a rendering in which a piece is missing, or stands twice.

    Args:
        reasoning: whether the reasoning is needed too.

    Raises:
        TemplateMismatch: naming the piece.
    """
    for piece in pieces.values():
        times = sum(each.piece is piece for each in located)
        if piece.kind == "reasoning" and not reasoning and times == 0:
            continue
        if times == 0:
            raise TemplateMismatch(f"{piece} is left out by the template")
        if times > 1 and piece.kind in ("reasoning", "content"):
            raise TemplateMismatch(f"{piece} is shown {times} times by the template")
