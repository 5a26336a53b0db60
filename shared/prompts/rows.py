# SPDX-License-Identifier: Apache-2.0
"""A row of somebody's data set as a `Prompt`: turns to play with the target.

synth answers prompts and bench measures on them. The shapes that a row may have:

    {"messages": [{"role": ..., "content": ...}, ...]}       chat
    {"conversations": [{"from": "human", "value": ...}]}      ShareGPT
    {"turns": ["first question", "second question"]}          MT-Bench's question.jsonl
    {"system_prompt": ..., "question": ..., "response": ...}  OpenOrca
    {"instruction": ..., "input": ..., "output": ..., "history": [[q, a]]}     Alpaca, LLaMA-Factory
    {"instruction": ..., "instances": [{"input": ..., "output": ...}]}         self-instruct
    {"input": [messages], "output": ...}                      Nemotron
    {"prompt": [messages], "completion": [messages]}          TRL; `chosen` likewise

and beside them an id, a `category` and the `tools` that the target may call. Columns that hold text
and are not read are named in `Prompt.unread`. A row that cannot be used is reported as a `BadRow`
with its position and a reason, and never ends the reading.

Worked example: [system, user, assistant, user] is two turns. The first asks (system, user), and the
row's own answer to it is the assistant's message; the second asks (user,) and has no answer.
"""

import dataclasses
import decimal
import hashlib
import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shared.prompts.columns import Columns
from shared.prompts.content import Unusable as Unusable
from shared.prompts.content import encodable
from shared.prompts.messages import Message as Message

_NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")
_MAX_NAME_CHARS = 512
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
    """The messages before the target speaks, and the row's own answer if it has one.

    Attributes:
        is_trained: whether the row's own answer may be trained on.
    """

    asked: tuple[Message, ...]
    answer: Message | None = None
    is_trained: bool = True


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation to play: at least one turn."""

    sample_id: str
    turns: tuple[Turn, ...]
    category: str = ""
    source: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    unread: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def conversation(self) -> tuple[Message, ...]:
        """Every message, the row's own answers included."""
        parts = [(*turn.asked, *([turn.answer] if turn.answer else [])) for turn in self.turns]
        return tuple(message for part in parts for message in part)

    @property
    def messages(self) -> tuple[Message, ...]:
        """Everything up to the last question: what an engine answers in one request."""
        end = len(self.conversation) - (self.turns[-1].answer is not None)
        return self.conversation[:end]

    @property
    def opening(self) -> str:
        """What comes before its first answer, tools included: equal for chats that begin alike."""
        return json.dumps([self.turns[0].asked, self.tools], sort_keys=True)

    def renamed(self, sample_id: str) -> "Prompt":
        """The same prompt under another id."""
        return dataclasses.replace(self, sample_id=sample_id)

    def as_row(self) -> dict[str, Any]:
        """A row that `parse_row` makes this prompt of: to be written as JSON.

        An answer that is not to be trained on has weight 0, a turn without an answer an empty one.
        """
        messages: list[Message] = []
        for turn in self.turns:
            messages += turn.asked
            if turn.answer is not None:
                messages.append(turn.answer if turn.is_trained else {**turn.answer, "weight": 0})
            elif turn is not self.turns[-1]:
                messages.append({"role": "assistant", "content": ""})
        row = {
            "id": self.sample_id,
            "category": self.category,
            "messages": messages,
            "tools": list(self.tools),
        }
        return {key: value for key, value in row.items() if value}

    def content_hash(self) -> str:
        """16 hex digits over turns and tools: equal for exact duplicates."""
        text = json.dumps([self.conversation, self.tools], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row, or a whole file, that gives no prompt: its position, and why."""

    row: str
    reason: str
    detail: str

    @property
    def is_skipped(self) -> bool:
        """Whether nothing is wrong with it: it is left out on purpose, and is not a failure."""
        return self.reason.startswith("duplicate") or self.reason == "file_not_read"


def _turns_of(messages: Iterable[Message]) -> Iterator[Turn]:
    """The turns; an empty answer counts as none.

    Raises:
        Unusable: an order of roles that no template knows.
    """
    asked: list[Message] = []
    before = ""
    for message in messages:
        role = message["role"]
        if before not in _MAY_FOLLOW[role]:
            raise Unusable(
                f"two_{role}_turns" if role == before else f"{role}_after_{before or 'nothing'}"
            )
        if role == "assistant":
            is_trained = message.get("weight") != 0
            message = {key: value for key, value in message.items() if key != "weight"}
            is_empty = not message["content"].strip() and "tool_calls" not in message
            yield Turn(tuple(asked), None if is_empty else message, is_trained)
            asked = []
        else:
            asked.append(message)
        before = role
    if before in ("", "system"):
        raise Unusable("no_user_turn")
    if asked:
        yield Turn(tuple(asked))


def is_name(text: str) -> bool:
    """Whether logs, tables and file systems can show `text`."""
    return len(text) <= _MAX_NAME_CHARS and text.isprintable()


def _name(value: str, label: str) -> str:
    """A row's own id or category, if it is fit to be shown."""
    if not is_name(encodable(value)):
        raise Unusable(f"bad_{label}", f"expected at most {_MAX_NAME_CHARS} printable characters")
    return value


def _id_text(value: Any) -> str:
    """A row's id as text, the same from every file format: 7, 7.0 and Decimal(7) are "7"."""
    if isinstance(value, bytes):
        return str(uuid.UUID(bytes=value)) if len(value) == 16 else value.hex()
    if isinstance(value, float | decimal.Decimal):
        if not math.isfinite(value):  # a table's gap
            return ""
        value = int(value) if value == value // 1 else value
    if isinstance(value, int):  # one of thousands of digits would not even become text
        return str(value) if abs(value) < 10**_MAX_NAME_CHARS else "\n"
    return str(value) if isinstance(value, str | float | decimal.Decimal | uuid.UUID) else ""


def parse_row(row: Any, *, source: str = "", columns: Mapping[str, str] | None = None) -> Prompt:
    """A data set's row as a prompt.

    Args:
        columns: where this data set keeps things, as our name (`COLUMNS`) -> its column.

    Raises:
        Unusable: it is none, with the reason.
    """
    if isinstance(row, list) and row and all(isinstance(each, dict) for each in row):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise Unusable("not_an_object", type(row).__name__)
    if media := [name for name in _NOT_TEXT if row.get(name)]:
        raise Unusable("not_text", f"the row has {media[0]}")
    reader = Columns(row, columns or {})
    messages = reader.messages()
    first = next((i for i, each in enumerate(messages) if each["role"] != "assistant"), 0)
    if first:  # the rest of a long conversation that somebody cut
        reader.unread.add("answers before the first question")
    category, own = reader.get("category", str), reader.get("id")
    if isinstance(own, list | dict):  # a file of columns instead of rows
        raise Unusable("bad_id", f"expected text or a number, found {type(own).__name__}")
    own_id = "" if isinstance(own, bool) else _id_text(own)
    prompt = Prompt(
        sample_id=_name(own_id, "id"),
        turns=tuple(_turns_of(messages[first:])),
        category=_name(category or "", "category"),
        source=source,
        tools=reader.tools(),
        unread=reader.unread_columns(messages),
    )
    # A row without an id gets its content's hash: stable over runs and over the file's order.
    return prompt if own_id else prompt.renamed(prompt.content_hash())
