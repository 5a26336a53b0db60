# SPDX-License-Identifier: Apache-2.0
"""The ids of tool calls, as some families want them.

Most templates take any id, or show none. Kimi's show `functions.weather:0` in the place of the call's
name, and Mistral's refuse all but nine letters or digits. An id is nobody's words, so the calls and
their results may be given others.
"""

from collections.abc import Callable, Iterator, Sequence

from shared.prompts.messages import Message

_STYLES: tuple[Callable[[str, int], str], ...] = (
    lambda name, number: f"functions.{name}:{number}",
    lambda name, number: f"{number:09d}",
)


def with_call_ids(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """The messages as they are, then with ids in each family's style, calls counted from 0."""
    yield messages
    if any(message.get("tool_calls") for message in messages):
        yield from (_renamed(messages, style) for style in _STYLES)


def _renamed(messages: Sequence[Message], style: Callable[[str, int], str]) -> list[Message]:
    """The messages with other ids; a result without an id answers the next call, in order."""
    renamed: list[Message] = []
    waiting: dict[str, str] = {}  # of the last message with calls: old id -> new id
    number = 0
    for message in messages:
        if calls := message.get("tool_calls"):
            waiting, changed = {}, []
            for place, call in enumerate(calls):
                new = style(call["function"]["name"], number)
                waiting[call.get("id") or f"#{place}"] = new
                changed.append({**call, "id": new})
                number += 1
            message = {**message, "tool_calls": changed}
        elif message["role"] == "tool" and waiting:
            old = message.get("tool_call_id")
            old = old if old in waiting else next(iter(waiting))
            message = {**message, "tool_call_id": waiting.pop(old)}
        renamed.append(message)
    return renamed
