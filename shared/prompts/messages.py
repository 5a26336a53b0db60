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

import contextlib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shared.prompts.content import (
    Unusable,
    encodable,
    from_json,
    is_text,
    reasoning_apart,
    text_of,
    texts,
    to_json,
)

Message = dict[str, Any]

_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"),
    "tool": ("tool", "function", "observation", "tool_response", "tool_result", "ipython"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_CALL_ROLES = ("function_call", "tool_call")
_CONTENT_KEYS = ("content", "value", "text", "parts", "refusal")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# 0 or false: not trained on; of the second line, 1 or true.
_WEIGHT_KEYS = (
    "weight", "train", "training", "trainable", "loss", "loss_weight", "loss_mask", "loss_scale",
)  # fmt: skip
_MASK_KEYS = ("masked", "ignore")
_SCALE_KEYS = ("weight", "loss_weight", "loss_scale")  # of these a mask holds 0 and 1 alone
# Names of switches about training that nobody reads: they are named even where they hold no text.
_SWITCH = re.compile(r"(?:^|_)(?:mask|loss|train|weight|ignore)", re.IGNORECASE)
# Which characters or tokens of one answer are trained on.
_DETAIL_KEYS = ("train_detail", "training_detail", "train_details")
_MARK_KEYS = (*_WEIGHT_KEYS, *_MASK_KEYS, *_DETAIL_KEYS)
_OTHER_KEYS = {
    "role", "from", "name", "channel", "id", "type", "tool_calls", "function_call", "tool_call_id",
    *_WEIGHT_KEYS, *_MASK_KEYS,
}  # fmt: skip
_READ_KEYS = {*_CONTENT_KEYS, *_REASONING_KEYS, *_OTHER_KEYS}
_ARGUMENT_KEYS = ("arguments", "parameters", "input", "args")
_CALL_KEYS = {"name", "description", "type", "id", *_ARGUMENT_KEYS}
# One question and its answer as two keys of one item: XTuner and Capybara, Firefly, Baize.
_PAIRS = (
    ("input", "output"),
    ("human", "assistant"),
    ("user", "assistant"),
    ("question", "answer"),
)


def is_message(value: Any) -> bool:
    """Whether it is one message, and not a row."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


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
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name.strip():
            raise Unusable("broken_tool_calls", call)
        filled = (key for key, value in function.items() if value and not isinstance(value, int))
        if unread := [str(key) for key in filled if key not in _CALL_KEYS]:
            raise Unusable("broken_tool_calls", f"a call with {', '.join(unread)}")
        arguments: Any = next(
            (v for key in _ARGUMENT_KEYS if (v := function.get(key)) is not None), {}
        )
        if not isinstance(arguments, str):  # the API's own form is JSON text
            arguments = to_json(arguments, "tool_calls")
        spelled = {"name": encodable(name), "arguments": encodable(arguments)}
        call_id = _id(call.get("id"))
        result.append({"id": call_id, "type": "function", "function": spelled})
    return result


def _id(value: Any) -> str:
    """A tool call's id; '' where there is none."""
    is_id = isinstance(value, str | int) and not isinstance(value, bool)
    return encodable(str(value)) if is_id else ""


def _reasoning(raw: Mapping[str, Any]) -> str:
    """What the keys for reasoning hold: a text, or a list of text parts; '' if they hold none.

    Raises:
        Unusable: two of them differ.
    """
    values = dict.fromkeys(text_of(raw[key]) for key in _REASONING_KEYS if raw.get(key))
    if len(values) > 1:
        raise Unusable("two_reasonings", " and ".join(k for k in _REASONING_KEYS if raw.get(k)))
    return next(iter(values), "")


def _number(value: Any) -> float | None:
    """A number or flag, in the spelling of any format; None for anything else."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return float(
            {"false": 0, "no": 0, "true": 1, "yes": 1}.get(str(value).strip().lower(), value)
        )
    return None


def is_no(value: Any) -> bool:
    """Whether it says no, in the spelling of any format."""
    number = _number(value)
    return number is not None and number <= 0


def is_untrained(raw: Mapping[str, Any]) -> bool:
    """Whether the row says that an answer is not to be trained on.

    Raises:
        Unusable: it says so of a part of the answer.
    """
    masked = [key for key in (*_WEIGHT_KEYS, *_MASK_KEYS) if isinstance(raw.get(key), list | dict)]
    if partly := [*masked, *(key for key in _DETAIL_KEYS if raw.get(key))]:
        raise Unusable("partly_trained", f"{partly[0]}: a part of an answer alone is trained on")
    is_off = any(is_no(raw.get(key)) for key in _WEIGHT_KEYS)
    return is_off or any(_number(raw.get(key)) == 1 for key in _MASK_KEYS)


def _filled(raw: Mapping[str, Any]) -> list[str]:
    """The keys for content that hold something; the first of them is read."""
    return [key for key in _CONTENT_KEYS if raw.get(key) not in (None, "", [])]


def is_untrained_row(row: Mapping[str, Any]) -> bool:
    """Whether a whole row says that its answers are not to be trained on."""
    keys = (*_WEIGHT_KEYS, *_MASK_KEYS)
    return is_untrained({k: row.get(k) for k in keys if not isinstance(row.get(k), list | dict)})


def unread_switches(raw: Mapping[str, Any]) -> Iterator[str]:
    """Keys of a row or of an answer that say how much of it to train on, and that nobody follows."""
    for key, value in raw.items():
        scale = _number(value) if key in _SCALE_KEYS else None
        if scale is not None and scale > 0 and scale != 1:
            yield f"{key} other than 0 or 1"
        is_followed = key in (*_WEIGHT_KEYS, *_MASK_KEYS) and not isinstance(value, list | dict)
        if value is None or isinstance(value, str) or value in ([], {}) or is_followed:
            continue  # what holds text is named anyway
        if _SWITCH.search(str(key)):
            yield str(key)


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
    filled = _filled(raw)
    content = raw[filled[0]] if filled else None
    if role in _CALL_ROLES:
        calls = _tool_calls(content)
        if not calls:
            raise Unusable("broken_tool_calls", content)
        return {"role": "assistant", "content": "", "tool_calls": calls}
    if role not in _ROLE_OF:
        raise Unusable("unknown_role", reprlib.repr(speaker))
    role = _ROLE_OF[role]
    if role == "tool" and not is_text(content):
        content = to_json(content, "tool_result")
    content, thought = reasoning_apart(content) if role == "assistant" else (content, "")
    message: Message = {"role": role, "content": text_of(content)}
    if role == "assistant":
        if is_untrained(raw):
            message["weight"] = 0
        if reasoning := _reasoning({**raw, "thinking": thought} if thought else raw):
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
        if pair := _pair(each):
            if each.get("system"):
                yield {"role": "system", "content": each["system"]}, False
            yield {"role": "user", "content": each[pair[0]]}, False
            marks = {key: each[key] for key in _MARK_KEYS if key in each}
            yield {"role": "assistant", "content": each[pair[1]], **marks}, False
        else:
            yield each, isinstance(each, dict) and each.get("channel") == "analysis"


def _pair(item: Any) -> tuple[str, ...]:
    """The keys of a question and its answer, where an item of a chat column holds both."""
    if not isinstance(item, dict) or item.get("role") or item.get("from"):
        return ()
    return next((pair for pair in _PAIRS if pair[0] in item and pair[1] in item), ())


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


def _keys_read(message: Mapping[str, Any]) -> set[str]:
    if pair := _pair(message):
        return {"system", *pair, *_MARK_KEYS}
    filled = _filled(message)
    return _READ_KEYS - {key for key in filled[1:] if message[key] != message[filled[0]]}


def _is_answer(message: Mapping[str, Any]) -> bool:
    role = message.get("role") or message.get("from")
    return bool(_pair(message)) or _ROLE_OF.get(str(role).strip().lower()) == "assistant"


def unread_keys(raw: Any) -> set[str]:
    """Keys of a chat column's messages that hold text, or say how to train, and are not read."""
    with contextlib.suppress(Unusable):  # reading the messages tells what is wrong
        raw = from_json(raw, "messages")
    found: set[str] = set()
    for message in raw if isinstance(raw, list) else []:
        if isinstance(message, dict):
            read = _keys_read(message)
            found |= {
                key for key, value in message.items() if key not in read and any(texts(value))
            }
            found |= set(unread_switches(message)) if _is_answer(message) else set()
    return {f"messages[].{key}" for key in found}
