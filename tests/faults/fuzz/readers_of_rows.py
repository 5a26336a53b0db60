# SPDX-License-Identifier: Apache-2.0
"""Prompts and conversations: whole files of them, and how they are read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.contracts import conversations
from shared.contracts.conversations import Conversation
from shared.prompts.rows import BadRow
from shared.prompts.sources import Source, read_source
from tests.faults.fuzz.reader import Reader, written


def _row(number: int) -> Conversation:
    return Conversation(
        sample_id=f"row-{number}",
        conversation_id=f"row-{number}",
        source="s",
        category="c",
        messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}),
        input_ids=(1, 2, 3, 4, 5),
        loss_spans=((1, 2), (3, 5)),
        finish_reason="stop",
        num_prompt_tokens=1,
        num_completion_tokens=3,
    )


def _make_part(folder: Path) -> Path:
    path = folder / conversations.part_name(0)
    conversations.write_part(path, [_row(number) for number in range(5)])
    return path


def _read_part(path: Path) -> None:
    for row in conversations.read_part(path):
        _ = row.loss_mask(), max(row.input_ids, default=0)
    conversations.read_columns(path, ["sample_id", "num_prompt_tokens"]).to_pylist()


def _make_prompts_parquet(folder: Path) -> Path:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"id": f"{i}", "messages": messages, "n": i, "category": "c"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def _prompt_rows() -> Iterator[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
    yield {"id": "a", "prompt": "q", "response": "a", "category": "c", "tools": [{"name": "f"}]}
    yield {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    yield {"turns": ["one", "two"], "question_id": 7}
    user = {"role": "user", "content": [{"type": "text", "text": "q"}]}
    called = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "r"}
    tool = {"role": "tool", "content": "1", "tool_call_id": "c"}
    yield {"messages": [user, called, tool], "tools": '[{"name": "f"}]'}


def _make_lines(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _prompt_rows()))
    return path


def _make_list(folder: Path) -> Path:
    return written(folder / "rows.json", list(_prompt_rows()))


def _read_rows(path: Path) -> None:
    for row in read_source(Source(path=str(path)), path.parent):
        if not isinstance(row, BadRow):
            text = json.dumps([row.content_hash(), row.sample_id, row.category, row.tools])
            text += json.dumps(row.conversation, ensure_ascii=False)
            text.encode()


ROWS: dict[str, Reader] = {
    "conversations": Reader(_make_part, _read_part),
    "prompts parquet": Reader(_make_prompts_parquet, _read_rows),
    "prompts lines": Reader(_make_lines, _read_rows, "lines"),
    "prompts list": Reader(_make_list, _read_rows, "json"),
}
