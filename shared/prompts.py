# SPDX-License-Identifier: Apache-2.0
"""A file of prompts: JSON lines with `prompt` or `messages`, and optionally `id` and `category`.

synth answers such rows and bench measures on them. Every line is accounted for: one that cannot be
used comes back as a `BadRow` with its line number and a reason, and never ends the reading.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One conversation whose next turn the target shall answer; it ends with a user turn."""

    sample_id: str
    messages: tuple[dict[str, str], ...]
    category: str


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A line that is no prompt, and why."""

    row: str
    reason: str
    detail: str


class _Unusable(ValueError):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def _messages(row: dict[str, Any]) -> tuple[dict[str, str], ...]:
    if "prompt" in row:
        raw: Any = [{"role": "user", "content": row["prompt"]}]
    elif "messages" in row:
        raw = row["messages"]
    else:
        raise _Unusable("no_prompt", f"keys {sorted(map(str, row))[:8]}")
    if not isinstance(raw, list) or not raw:
        raise _Unusable("empty_messages")
    messages = []
    for message in raw:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise _Unusable("unknown_role", repr(role)[:80])
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise _Unusable("empty_content")
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "user":
        raise _Unusable("last_turn_not_user")
    return tuple(messages)


def _sample_id(row: dict[str, Any], messages: tuple[dict[str, str], ...]) -> str:
    """The row's own id, else a hash of its content: stable over runs and over file order."""
    own = row.get("id")
    if isinstance(own, str | int) and not isinstance(own, bool) and str(own):
        return str(own)
    text = json.dumps(messages, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_prompt(line: bytes) -> Prompt:
    """One line as a prompt; raises ValueError with `.reason` where it is none."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Unusable("not_utf8", str(error)) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise _Unusable("broken_json", str(error)) from error
    if not isinstance(row, dict):
        raise _Unusable("not_an_object", type(row).__name__)
    messages = _messages(row)
    return Prompt(_sample_id(row, messages), messages, str(row.get("category") or ""))


def read_prompts(path: Path) -> Iterator[Prompt | BadRow]:
    """Every non-blank line of `path`, in order; a second row with the same id is a BadRow.

    Raises:
        UserError: the file cannot be read.
    """
    seen: set[str] = set()
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    prompt = parse_prompt(line)
                except _Unusable as unusable:
                    yield BadRow(f"line {number}", unusable.reason, unusable.detail)
                    continue
                if prompt.sample_id in seen:
                    yield BadRow(prompt.sample_id, "duplicate_id", f"line {number}")
                    continue
                seen.add(prompt.sample_id)
                yield prompt
    except OSError as error:
        raise UserError(f"could not read prompts from {path}: {error.strerror}.") from error
