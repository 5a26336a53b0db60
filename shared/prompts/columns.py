# SPDX-License-Identifier: Apache-2.0
"""Which columns of a row hold its messages and tools, and which ones nobody reads."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shared.prompts.content import Unusable, encodable, from_json, text_of, texts, to_json
from shared.prompts.messages import (
    Message,
    is_message,
    is_no,
    is_untrained_row,
    read_messages,
    unread_keys,
    unread_switches,
)

# What a recipe's `columns` may map, and the names that are read without a map, first match first.
_NAMES: dict[str, tuple[str, ...]] = {
    "messages": (
        "messages", "conversations", "conversation", "dialog", "dialogue", "data", "contents",
    ),
    "turns": ("turns",),
    "prompt": ("prompt", "question", "query", "problem", "instruction", "input", "inputs"),
    "input": ("input", "context"),
    "answer": (
        "response", "output", "solution", "answer", "completion", "chosen", "target", "targets",
    ),
    "reasoning": ("reasoning_content", "reasoning", "thinking"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "id": ("id", "sample_id", "conversation_id", "question_id", "prompt_id", "task_id", "uuid"),
    "category": ("category",),
    "tools": ("tools", "functions"),
}  # fmt: skip
COLUMNS = tuple(_NAMES)
# Text about the row that is no part of the conversation: left out without a word.
_ABOUT = {
    "source", "dataset", "model", "license", "language", "lang", "split", "url", "type", "generator",
    "version", "date", "timestamp", "created_at", "author", "hash", "metadata",
}  # fmt: skip

_SWITCHES = "chat_template_kwargs"  # of one row; a run has one setting for all
# What a column `reasoning` holds where it says whether, or how much, was thought.
_EFFORTS = {"on", "off", "yes", "no", "true", "false", "none", "low", "medium", "high", "0", "1"}
_PRINTED = re.compile(r"\s*\[\s*\{\s*'(?:role|content|from|value)'\s*:")
_TRANSCRIPT = re.compile(r"\s*#* ?(?:human|user): .*\n#* ?assistant:", re.IGNORECASE | re.DOTALL)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _messages_in(value: Any) -> Any:
    """`value`, or the messages that it spells: tables hold nested values as JSON text.

    Raises:
        Unusable: they are spelled as Python prints them, which no format promises to be readable.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    if _PRINTED.match(value):
        raise Unusable("printed_messages", "messages as Python prints them: write them as JSON")
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_chat = isinstance(read, list) and bool(read) and all(map(is_message, read))
    return read if is_chat else value


def _user(content: Any) -> Message:
    (message,) = read_messages([{"role": "user", "content": content}])
    return message


def _joined(asked: list[Message], answer: list[Message]) -> list[Message]:
    """A question and the messages of its answer, which may repeat the question.

    Raises:
        Unusable: the answer is a conversation about something else.
    """
    if answer[0]["role"] == "assistant":
        return [*asked, *answer]
    spoken = [[m for m in each if m["role"] != "system"] for each in (asked, answer)]
    if spoken[0] != spoken[1][: len(spoken[0])]:
        raise Unusable("two_conversations", "an answer with messages that do not begin as asked")
    return answer if answer[0]["role"] == "system" else [*asked, *spoken[1][len(spoken[0]) :]]


class Columns:
    """One row's columns by our names.

    Args:
        mapped: our name (`COLUMNS`) -> this data set's column; it replaces the usual names.

    Attributes:
        unread: names of what holds text and was not read, beside whole columns.
    """

    def __init__(self, row: Mapping[str, Any], mapped: Mapping[str, str]) -> None:
        self.row = row
        self.unread: set[str] = set()
        self._mapped = mapped
        self._read: set[str] = set()

    def _names(self, column: str) -> Sequence[str]:
        return (self._mapped[column],) if column in self._mapped else _NAMES[column]

    def get(self, column: str, *kinds: type) -> Any:
        """The first value for `column` that holds something, of one of the kinds; None if none does."""
        for name in self._names(column):
            value = self.row.get(name)
            if _is_empty(value) or name in self._read or (kinds and not isinstance(value, kinds)):
                continue
            self._read.add(name)
            return value
        return None

    def messages(self) -> list[Message]:
        """All messages: system column, history, question, answer.

        Raises:
            Unusable: there are none, or one of them cannot be used.
        """
        messages = self._question()
        if messages and messages[-1]["role"] != "assistant":
            messages = self._answered(messages)
        messages = self._marked(messages)
        system = text_of(self.get("system", str, list))
        if messages and messages[0]["role"] == "system":
            if system.strip() and system != messages[0]["content"]:
                raise Unusable("two_system_turns", "a system column beside a system message")
            return [messages[0], *self._history(), *messages[1:]]
        start = [{"role": "system", "content": encodable(system)}] if system.strip() else []
        return [*start, *self._history(), *messages]

    def _marked(self, messages: list[Message]) -> list[Message]:
        """The messages; those that the whole row marks as not to be trained on with weight 0.

        KTO's label is about the last answer. Elsewhere a label that is no flag is somebody's class.
        """
        is_flag = isinstance(self.row.get("label"), bool) or "completion" in self._read
        verdicts = ("kto_tag", "label") if is_flag else ("kto_tag",)
        self._read |= set(verdicts)
        if is_untrained_row(self.row):
            answers = [i for i, each in enumerate(messages) if each["role"] == "assistant"]
        else:
            answers = [-1] if any(is_no(self.row.get(name)) for name in verdicts) else []
        marked = list(messages)
        for index in answers:
            if marked and marked[index]["role"] == "assistant":
                marked[index] = {**marked[index], "weight": 0}
        return marked

    def _question(self) -> list[Message]:
        """The row's chat, or what is asked where its columns are texts."""
        if (chat := self._chat()) is not None:
            self.unread |= unread_keys(chat)
            return read_messages(chat)
        turns = from_json(self.get("turns"), "turns")
        if turns is None:
            text = self.get("prompt")
            if text is None and (chat := self._whole_chat(self._names("answer"))) is not None:
                self.unread |= unread_keys(chat)  # TRL's preferences without a prompt
                return read_messages(chat)
            if text is None:
                raise self._nothing_asked()
            if isinstance(text, str) and _TRANSCRIPT.match(text):
                raise Unusable("transcript", "several speakers in one text")
            turns = text if isinstance(text, list) else [self._with_input(text)]
        if not isinstance(turns, list) or not turns:
            raise Unusable("empty_messages")
        unanswered = {"role": "assistant", "content": ""}
        texts_of_turns = [each.get("content") if isinstance(each, dict) else each for each in turns]
        return [each for text in texts_of_turns for each in (_user(text), unanswered)][:-1]

    def _chat(self) -> Any:
        """The column with messages: by its name, or a prompt, input or turns that holds messages."""
        for name in self._names("messages"):
            value = self.row.get(name)
            is_json = isinstance(value, str) and value.lstrip().startswith(("[", "{"))
            if not _is_empty(value) and (
                is_json or isinstance(value, list | dict) or "messages" in self._mapped
            ):
                self._read.add(name)
                return value
        return self._whole_chat((*self._names("prompt"), *self._names("turns")))

    def _whole_chat(self, names: Iterable[str]) -> Any:
        """The first of these columns that holds messages."""
        for name in names:
            value = _messages_in(self.row.get(name))
            if isinstance(value, list) and value and self._is_turn(value[0]):
                self._read.add(name)
                return value
        return None

    @staticmethod
    def _is_turn(value: Any) -> bool:
        """Whether it has a speaker; a question alone (`{"content": ...}`) has none."""
        return isinstance(value, dict) and (is_message(value) or "content" not in value)

    def _nothing_asked(self) -> Unusable:
        if any(name in self.row for name in (*self._names("messages"), *self._names("turns"))):
            return Unusable("empty_messages")
        if any(name in self.row for name in self._names("prompt")):
            return Unusable("empty_content", "user")
        return Unusable("no_prompt", f"keys {sorted(map(str, self.row))[:8]}")

    def _instance(self) -> Mapping[str, Any]:
        """self-instruct's first instance of an instruction."""
        instances = self.row.get("instances")
        if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
            return {}
        self._read.add("instances")
        if len(instances) > 1:
            self.unread.add("instances[1:]")
        return instances[0]

    def _with_input(self, text: Any) -> Any:
        """The instruction and its input; elsewhere the two belong together only by `columns`."""
        if "input" not in self._mapped and "instruction" not in self._read:
            return text
        more = self.get("input", str) or text_of(self._instance().get("input"))
        return f"{text_of(text)}\n\n{encodable(more)}" if more.strip() else text

    def _answered(self, asked: list[Message]) -> list[Message]:
        """What was asked, and the row's own answer to it if it has one."""
        answer = _messages_in(self._instance().get("output") or self.get("answer", str, list))
        if isinstance(answer, list) and isinstance(answer[0], dict):
            self.unread |= unread_keys(answer)
            said = read_messages(answer)
            return _joined(asked, said) if said else asked
        if not isinstance(answer, str):
            self._read -= set(self._names("answer"))  # several references, no answer among them
            return asked
        if not answer.strip():
            return asked
        message: Message = {"role": "assistant", "content": encodable(answer)}
        reasoning = self.get("reasoning", str) or ""
        if reasoning.strip().lower() not in {"", *_EFFORTS}:
            message["reasoning_content"] = encodable(reasoning)
        return [*asked, message]

    def _history(self) -> list[Message]:
        """LLaMA-Factory's earlier turns: [[question, answer], ...]."""
        pairs = from_json(self.get("history", list, str), "history") or []
        if isinstance(pairs, list) and pairs and all(isinstance(each, dict) for each in pairs):
            return read_messages(pairs)
        messages = []
        for pair in pairs if isinstance(pairs, list) else [pairs]:
            if not isinstance(pair, list) or len(pair) != 2:
                raise Unusable("broken_history", "expected a list of [question, answer]")
            messages += [_user(pair[0]), {"role": "assistant", "content": text_of(pair[1])}]
        return messages

    def tools(self) -> tuple[dict[str, Any], ...]:
        """The tools that the target may call, as the server takes them."""
        tools = from_json(self.get("tools"), "tools") or []
        if isinstance(tools, list):
            tools = [from_json(tool, "tools") for tool in tools]
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise Unusable("broken_tools", type(tools).__name__)
        to_json(tools, "tools")
        wrapped = [t if "function" in t else {"type": "function", "function": t} for t in tools]
        for tool in wrapped:
            function = tool["function"]
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise Unusable("broken_tools", "a tool without a name")
        return tuple(wrapped)

    def unread_columns(self, messages: Iterable[Message]) -> tuple[str, ...]:
        """Names of what holds text that is neither read nor in the messages, sorted."""
        known = {message["content"].strip() for message in messages}
        aside = {*self._read, *_ABOUT, *self._names("id")}
        names = (
            str(name)
            for name, value in self.row.items()
            if name not in aside and not known.issuperset(texts(value))
        )
        if self.row.get(_SWITCHES):
            self.unread.add(_SWITCHES)
        self.unread |= set(unread_switches({k: v for k, v in self.row.items() if k not in aside}))
        return tuple(sorted({*names, *self.unread}))
