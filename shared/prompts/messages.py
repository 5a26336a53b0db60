# SPDX-License-Identifier: Apache-2.0
"""One message of somebody's data set, in the form that chat templates and vLLM's server take.

    {"role": "user", "content": ...}            OpenAI; content may be a list of text parts
    {"from": "human", "value": ...}             ShareGPT
    {"from": "function_call", "value": JSON}    LLaMA-Factory; OpenAI's older `function_call` likewise
    {"role": "assistant", "channel": ...}       harmony: what the channel "analysis" holds is reasoning
    "text"                                      the speakers take turns, the user first

The result has `role` (system, user, assistant, tool) and `content`, and where the row has them
`reasoning_content`, `tool_calls` (arguments as JSON text), `tool_call_id` and `name`; and `weight` 0
where the row says that an answer is not to be trained on (`weight: 0`, `train: false` and the like).
"""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = dict[str, Any]

_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"),
    "tool": ("tool", "function", "observation", "tool_response", "tool_result", "ipython"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_CALL_ROLES = ("function_call", "tool_call")
_CONTENT_KEYS = ("content", "value", "text", "refusal")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# 0 or false: not trained on; of the second line, 1 or true.
_WEIGHT_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_mask")
_MASK_KEYS = ("masked", "ignore")
_OTHER_KEYS = {
    "role", "from", "name", "channel", "id", "type", "tool_calls", "function_call", "tool_call_id",
    *_WEIGHT_KEYS, *_MASK_KEYS,
}  # fmt: skip
_READ_KEYS = {*_CONTENT_KEYS, *_REASONING_KEYS, *_OTHER_KEYS}
_ARGUMENT_KEYS = ("arguments", "parameters", "input", "args")
_CALL_KEYS = {"name", "description", "type", "id", *_ARGUMENT_KEYS}
_TEXT_PARTS = ("text", "input_text", "output_text")


class Unusable(ValueError):
    """A row cannot be used; `reason` is a short word for the accounting."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = (detail if isinstance(detail, str) else reprlib.repr(detail))[:200]


def is_message(value: Any) -> bool:
    """Whether it is one message, and not a row."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


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
    if not isinstance(part, dict) or part.get("type", "text") not in _TEXT_PARTS:
        raise Unusable("not_text", "content has parts that are not text")
    return str(part.get("text") or "")


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


def _tool_calls(raw: Any) -> list[Message]:
    calls = from_json(raw, "tool_calls") or []
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise Unusable("broken_tool_calls", type(calls).__name__)
    result = []
    for each in calls:
        call = from_json(each, "tool_calls")
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable("broken_tool_calls", call)
        filled = (key for key, value in function.items() if value and not isinstance(value, int))
        if unread := [str(key) for key in filled if key not in _CALL_KEYS]:
            raise Unusable("broken_tool_calls", f"a call with {', '.join(unread)}")
        arguments: Any = next(
            (v for key in _ARGUMENT_KEYS if (v := function.get(key)) is not None), {}
        )
        if not isinstance(arguments, str):  # the API's own form is JSON text
            arguments = to_json(arguments, "tool_calls")
        named = {"name": encodable(function["name"]), "arguments": encodable(arguments)}
        call_id = _id(call.get("id"))
        result.append({"id": call_id, "type": "function", "function": named})
    return result


def _id(value: Any) -> str:
    """A tool call's id; '' where there is none."""
    is_id = isinstance(value, str | int) and not isinstance(value, bool)
    return encodable(str(value)) if is_id else ""


def _reasoning(raw: Mapping[str, Any]) -> str:
    """The first of the keys for reasoning that holds text: a text, or a list of text parts."""
    values = [raw[key] for key in _REASONING_KEYS if raw.get(key)]
    return text_of(values[0]) if values else ""


def is_untrained(raw: Mapping[str, Any]) -> bool:
    """Whether the row says that an answer is not to be trained on."""
    weights, masks = (
        [str(raw.get(key)).strip().lower() for key in keys] for keys in (_WEIGHT_KEYS, _MASK_KEYS)
    )
    is_off = any(value in ("0", "0.0", "false") for value in weights)
    return is_off or any(value in ("1", "1.0", "true") for value in masks)


def _message(raw: Any) -> Message:
    """One message.

    Raises:
        Unusable: not a message, an unknown role, content that is not text, nothing asked.
    """
    raw = from_json(raw, "message")
    if not isinstance(raw, dict):
        raise Unusable("not_a_message", type(raw).__name__)
    speaker = raw.get("role") or raw.get("from")
    role = speaker.strip().lower() if isinstance(speaker, str) else ""
    content = next((raw[key] for key in _CONTENT_KEYS if raw.get(key) is not None), None)
    if role in _CALL_ROLES:
        calls = _tool_calls(content)
        if not calls:
            raise Unusable("broken_tool_calls", content)
        return {"role": "assistant", "content": "", "tool_calls": calls}
    if role not in _ROLE_OF:
        raise Unusable("unknown_role", reprlib.repr(speaker))
    role = _ROLE_OF[role]
    if role == "tool" and isinstance(content, dict):
        content = to_json(content, "tool_result")
    message: Message = {"role": role, "content": text_of(content)}
    if role == "assistant":
        if is_untrained(raw):
            message["weight"] = 0
        if reasoning := _reasoning(raw):
            message["reasoning_content"] = reasoning
        if calls := _tool_calls(raw.get("tool_calls") or raw.get("function_call")):
            message["tool_calls"] = calls
    if role == "tool" and (call_id := _id(raw.get("tool_call_id"))):
        message["tool_call_id"] = call_id
    if isinstance(raw.get("name"), str) and raw["name"]:
        message["name"] = encodable(raw["name"])
    if role == "user" and not message["content"].strip():
        raise Unusable("empty_content", role)
    return message


def _each(raw: Sequence[Any]) -> Iterator[tuple[Any, bool]]:
    """(message as the row has it, whether it is reasoning only)."""
    if all(isinstance(each, str) and not each.lstrip().startswith("{") for each in raw):
        for index, text in enumerate(raw):
            yield {"role": ("user", "assistant")[index % 2], "content": text}, False
        return
    for each in raw:
        is_pair = isinstance(each, dict) and not (each.get("role") or each.get("from"))
        if is_pair and "input" in each and "output" in each:  # XTuner, Capybara
            if each.get("system"):
                yield {"role": "system", "content": each["system"]}, False
            yield {"role": "user", "content": each["input"]}, False
            yield {"role": "assistant", "content": each["output"]}, False
        else:
            yield each, isinstance(each, dict) and each.get("channel") == "analysis"


def read_messages(raw: Any) -> list[Message]:
    """The messages of a chat column: a list, its JSON text, or a table's struct of lists.

    An empty system message is left out; reasoning that is a message of its own joins the answer.

    Raises:
        Unusable: one of them is no message.
    """
    raw = from_json(raw, "messages")
    if isinstance(raw, dict) and raw and all(isinstance(each, list) for each in raw.values()):
        if len({len(each) for each in raw.values()}) > 1:
            raise Unusable("broken_messages", "lists of different lengths")
        rows = zip(*raw.values(), strict=True)  # Arrow's form of a sequence of structs
        raw = [dict(zip(raw, row, strict=True)) for row in rows]
    if not isinstance(raw, list) or not raw:
        raise Unusable("empty_messages")
    messages: list[Message] = []
    reasoning = ""
    for each, is_reasoning in _each(raw):
        message = _message(each)
        if is_reasoning:
            reasoning += message["content"]
            continue
        if reasoning and message["role"] == "assistant":
            message.setdefault("reasoning_content", reasoning)
            reasoning = ""
        if message["role"] == "system" and not message["content"].strip():
            continue
        messages.append(message)
    if reasoning:
        raise Unusable("only_reasoning", "a message on the channel analysis without a final one")
    return messages


def unread_keys(raw: Any) -> set[str]:
    """Keys of a chat column's messages that hold text and are not read."""
    return {
        f"messages[].{key}"
        for message in (raw if isinstance(raw, list) else [])
        if isinstance(message, dict) and (message.get("role") or message.get("from"))
        for key, value in message.items()
        if key not in _READ_KEYS and any(texts(value))
    }
