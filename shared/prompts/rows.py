# SPDX-License-Identifier: Apache-2.0
"""A row of somebody's data set as a `Prompt`: turns to play with the target.

synth answers prompts and bench measures on them. The shapes that a row may have:

    {"messages": [{"role": ..., "content": ...}, ...]}       chat; "conversation(s)" likewise
    {"conversations": [{"from": "human", "value": ...}]}      ShareGPT
    {"turns": ["first question", "second question"]}          MT-Bench's question.jsonl
    {"prompt": ...}, {"question": ...}, {"instruction": ..., "input": ..., "output": ...}

and beside them an id, a `category` and the `tools` that the target may call. A row that cannot be
used comes back as a `BadRow` with its place and a reason, and never ends the reading.

Worked example: [system, user, assistant, user] is two turns: the first asks (system, user) and the
row's own answer to it is the assistant's message; the second asks (user,) and has no answer.
"""

import dataclasses
import hashlib
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Message = dict[str, Any]
Row = Mapping[str, Any]

CHAT_COLUMNS = ("messages", "conversations", "conversation")
TEXT_COLUMNS = ("prompt", "question", "query", "instruction")
ANSWER_COLUMNS = ("response", "output", "answer", "completion")
ID_COLUMNS = ("id", "sample_id", "conversation_id", "question_id", "prompt_id", "uuid")
_LONGEST_NAME = 512
COLUMNS = ("messages", "turns", "prompt", "answer", "id", "category", "tools")
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# What may stand before a message; "" is the beginning of the conversation.
_MAY_FOLLOW = {
    "system": {""},
    "user": {"", "system", "assistant", "tool"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


def short_hash(text: str) -> int:
    """64 bits of SHA-256: the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


@dataclasses.dataclass(frozen=True)
class Turn:
    """What is said before the target speaks, and what the row itself has as the answer."""

    asked: tuple[Message, ...]
    answer: Message | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation to play: at least one turn."""

    sample_id: str
    turns: tuple[Turn, ...]
    category: str = ""
    source: str = ""
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def conversation(self) -> tuple[Message, ...]:
        """Every message, the row's own answers included."""
        parts = [(*turn.asked, *([turn.answer] if turn.answer else [])) for turn in self.turns]
        return tuple(message for part in parts for message in part)

    @property
    def messages(self) -> tuple[Message, ...]:
        """Everything up to the last thing asked: what an engine answers in one go."""
        end = len(self.conversation) - (self.turns[-1].answer is not None)
        return self.conversation[:end]

    def content_hash(self) -> str:
        """16 hex digits over turns and tools: equal for exact duplicates."""
        text = json.dumps([self.conversation, self.tools], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that is no prompt: where it stands, and why."""

    row: str
    reason: str
    detail: str

    @property
    def is_duplicate(self) -> bool:
        """Nothing is wrong with it but that it was there before: skipped, not failed."""
        return self.reason.startswith("duplicate")


class Unusable(ValueError):
    """A row cannot be used; `reason` is a short word for the accounting."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = (detail if isinstance(detail, str) else reprlib.repr(detail))[:200]


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair, which no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable("not_utf8", error.reason) from error
    return text


def _text(content: Any) -> str:
    """A message's text; lists of text parts, as the OpenAI format has them, are joined."""
    if isinstance(content, list) and content:
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise Unusable("not_text", "content has parts that are no text")
        content = "".join(str(part.get("text") or "") for part in content)
    if content is None:
        return ""
    if not isinstance(content, str):
        raise Unusable("not_text", f"content is {type(content).__name__}")
    return _encodable(content)


def _json(value: Any, label: str) -> Any:
    """`value` itself, or what its text holds: Parquet columns carry nested things as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise Unusable(f"broken_{label}", error) from error


def _dumped(value: Any, label: str) -> str:
    """`value` as JSON text that a file can hold."""
    try:
        return _encodable(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, Unusable):
            raise
        raise Unusable(f"broken_{label}", str(error)) from error


def _tool_calls(raw: Any) -> list[dict[str, Any]]:
    calls = _json(raw, "tool_calls") or []
    if not isinstance(calls, list):
        raise Unusable("broken_tool_calls", type(calls).__name__)
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable("broken_tool_calls", call)
        arguments = function.get("arguments")
        if not isinstance(arguments, str):  # the API's own form is JSON text
            arguments = _dumped(arguments if arguments is not None else {}, "tool_calls")
        own, name = call.get("id"), _encodable(function["name"])
        plain = {"name": name, "arguments": _encodable(arguments)}
        named = _encodable(own) if isinstance(own, str) else ""
        found.append({"id": named, "type": "function", "function": plain})
    return found


def _message(raw: Any) -> Message:
    if not isinstance(raw, dict):
        raise Unusable("not_a_message", type(raw).__name__)
    named = raw.get("role", raw.get("from"))
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise Unusable("unknown_role", reprlib.repr(named))
    message: Message = {"role": role, "content": _text(raw.get("content", raw.get("value")))}
    if role == "assistant":
        reasoning = raw.get("reasoning_content") or raw.get("reasoning")
        if isinstance(reasoning, str):
            message["reasoning_content"] = _encodable(reasoning)
        if calls := _tool_calls(raw.get("tool_calls")):
            message["tool_calls"] = calls
    if role == "tool" and isinstance(raw.get("tool_call_id"), str):
        message["tool_call_id"] = _encodable(raw["tool_call_id"])
    if not message["content"].strip() and "tool_calls" not in message:
        raise Unusable("empty_content", role)
    return message


def _turns_of(messages: Iterable[Message]) -> Iterator[Turn]:
    asked: list[Message] = []
    before = ""
    for message in messages:
        role = message["role"]
        if before not in _MAY_FOLLOW[role]:
            reason = (
                f"two_{role}_turns" if role == before else f"{role}_after_{before or 'nothing'}"
            )
            raise Unusable(reason)
        if role == "assistant":
            yield Turn(tuple(asked), message)
            asked = []
        else:
            asked.append(message)
        before = role
    if before == "system":
        raise Unusable("no_user_turn")
    if asked:
        yield Turn(tuple(asked))


def _first(row: Row, names: Iterable[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _find_turns(row: Row, columns: Mapping[str, str]) -> tuple[Turn, ...]:
    """The turns, from the column that is there; an empty conversation is an error."""
    chat = _first(row, [columns["messages"]] if "messages" in columns else CHAT_COLUMNS)
    questions = row.get(columns.get("turns", "turns"))
    text = _first(row, [columns["prompt"]] if "prompt" in columns else TEXT_COLUMNS)
    if isinstance(text, list):  # some data sets keep a whole chat under "prompt"
        chat, text = chat if chat is not None else text, None
    if chat is not None:
        chat = _json(chat, "messages")
        if not isinstance(chat, list) or not chat:
            raise Unusable("empty_messages")
        return tuple(_turns_of(map(_message, chat)))
    if questions is not None:
        if not isinstance(questions, list) or not questions:
            raise Unusable("empty_messages")
        return tuple(Turn((_message({"role": "user", "content": text}),)) for text in questions)
    if text is None:
        raise Unusable("no_prompt", f"keys {sorted(map(str, row))[:8]}")
    if "prompt" not in columns and text is row.get("instruction") and row.get("input"):
        text = f"{_text(text)}\n\n{_text(row['input'])}"
    answer = _first(row, [columns["answer"]] if "answer" in columns else ANSWER_COLUMNS)
    said = isinstance(answer, str) and answer.strip()
    asked = (_message({"role": "user", "content": text}),)
    if not said:
        return (Turn(asked),)
    return (Turn(asked, {"role": "assistant", "content": _encodable(answer)}),)


def _find_tools(row: Row, columns: Mapping[str, str]) -> tuple[dict[str, Any], ...]:
    tools = _json(row.get(columns.get("tools", "tools")), "tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("broken_tools", type(tools).__name__)
    _dumped(tools, "tools")
    wrapped = (t if "function" in t else {"type": "function", "function": t} for t in tools)
    return tuple(wrapped)


def is_name(text: str) -> bool:
    """Whether logs, tables and file systems can show `text`."""
    return len(text) <= _LONGEST_NAME and text.isprintable()


def _name(value: str | int, label: str) -> str:
    """A row's own id or category, if it is fit to be shown."""
    if isinstance(value, int):  # one of thousands of digits would not even become text
        value = str(value) if abs(value) < 10**_LONGEST_NAME else "\n"
    if not is_name(_encodable(value)):
        raise Unusable(f"bad_{label}", f"expected at most {_LONGEST_NAME} printable characters")
    return value


def parse_row(row: Any, *, source: str = "", columns: Mapping[str, str] | None = None) -> Prompt:
    """A data set's row as a prompt.

    Args:
        columns: where this data set keeps things, as our name (`COLUMNS`) -> its column.

    Raises:
        Unusable: it is none, with the reason.
    """
    if not isinstance(row, Mapping):
        raise Unusable("not_an_object", type(row).__name__)
    columns = columns or {}
    turns = _find_turns(row, columns)
    own = _first(row, [columns["id"]] if "id" in columns else ID_COLUMNS)
    named = isinstance(own, str | int) and not isinstance(own, bool) and own != ""
    category = row.get(columns.get("category", "category"))
    prompt = Prompt(
        sample_id=_name(own, "id") if named else "",
        turns=turns,
        category=_name(category, "category") if isinstance(category, str) else "",
        source=source,
        tools=_find_tools(row, columns),
    )
    # A row without an id gets its content's hash: stable over runs and over the file's order.
    return prompt if named else dataclasses.replace(prompt, sample_id=prompt.content_hash())


def parse_line(line: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        Unusable: it is not UTF-8, or not JSON.
    """
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Unusable("not_utf8", error) from error
    except (ValueError, RecursionError) as error:
        raise Unusable("broken_json", error) from error
