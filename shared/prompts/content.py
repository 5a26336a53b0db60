# SPDX-License-Identifier: Apache-2.0
"""The text in a message's content, whatever holds it: a text, a list of parts, JSON as text."""

import json
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from shared.io.files import printable

_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning")


class Unusable(ValueError):
    """A row cannot be used; `reason` is a short word for the accounting."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(reason)
        self.reason = reason
        # Python's own parsers put the reason and the place last: an exception is not shortened within.
        is_said = isinstance(detail, str | Exception)
        self.detail = printable(str(detail) if is_said else reprlib.repr(detail))[:200]


def encodable(text: str) -> str:
    """`text` itself; JSON can spell half a surrogate pair, which no file can hold.

    Raises:
        Unusable: it is not encodable as UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable("not_utf8", error.reason) from error
    return text


def text_of(content: Any) -> str:
    """A message's text; lists of text parts, as the OpenAI format has them, are joined."""
    if isinstance(content, list):
        content = "".join(map(_part_text, content))
    if content is None:
        return ""
    if not isinstance(content, str):
        raise Unusable("not_text", f"content is {type(content).__name__}")
    return encodable(content)


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind == "refusal":
        return text_of(part.get("refusal"))
    if kind not in _TEXT_PARTS:
        raise Unusable("not_text", "content has parts that are not text")
    text = part.get("text")
    if isinstance(text, dict):  # OpenAI's assistants: {"value": ..., "annotations": [...]}
        text = text.get("value")
    others = {key: value for key, value in part.items() if key != "type"}
    if not isinstance(text, str) and (text is not None or any(texts(others))):
        raise Unusable("not_text", f"a part of content with the keys {sorted(part)}")
    return text or ""


def reasoning_apart(content: Any) -> tuple[Any, str]:
    """A content without its leading parts of reasoning, and what those say.

    Worked example: [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}].
    """
    said = ""
    while isinstance(content, list) and content and isinstance(content[0], dict):
        kind = content[0].get("type")
        if kind not in _REASONING_PARTS:
            break
        said += text_of(content[0].get(kind) or content[0].get("text"))
        content = content[1:]
    return content, said


def texts(value: Any) -> Iterator[str]:
    """Every text inside a value that is not blank."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from texts(inner)


def from_json(value: Any, label: str) -> Any:
    """`value` itself, or what its text holds: tables carry nested values as JSON text.

    Raises:
        Unusable: broken_<label>.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise Unusable(f"broken_{label}", error) from error


def to_json(value: Any, label: str) -> str:
    """`value` as JSON text that a file can hold.

    Raises:
        Unusable: broken_<label>, not_utf8.
    """
    try:
        return encodable(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, Unusable):
            raise
        raise Unusable(f"broken_{label}", str(error)) from error


def is_text(content: Any) -> bool:
    """Whether it is none, a text, or a list of text parts."""
    parts = content if isinstance(content, list) else []
    is_parts = bool(parts) and all(
        isinstance(p, dict) and p.get("type") in _TEXT_PARTS for p in parts
    )
    return content is None or isinstance(content, str) or is_parts
