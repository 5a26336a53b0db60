# SPDX-License-Identifier: Apache-2.0
"""What is written: Parquet parts of whole conversations, and what they add up to.

Part names carry the share that wrote them, `part-<share>-<number>.parquet`, so that several
processes write into one folder; what any of them wrote counts as done for all.
"""

import collections
import dataclasses
from pathlib import Path
from typing import Any

from shared.contracts import conversations
from shared.contracts.conversations import Conversation

_COLUMNS = (
    "conversation_id",
    "finish_reason",
    "num_prompt_tokens",
    "num_completion_tokens",
    "input_ids",
    "loss_spans",
)


def done_ids(folder: Path) -> set[str]:
    """Ids of the conversations that the parts in `folder` hold."""
    found: set[str] = set()
    for path in sorted(folder.glob(conversations.PART_GLOB)):
        column = conversations.read_columns(path, ["conversation_id"])["conversation_id"]
        found.update(column.to_pylist())
    return found


class PartWriter:
    """Collects conversations into parts; a kill loses at most those of one part."""

    def __init__(self, folder: Path, rows_per_part: int, share_index: int) -> None:
        self.folder = folder
        self.rows_per_part = rows_per_part
        self.answer_tokens = 0
        self._share_index = share_index
        own = sorted(folder.glob(f"part-{share_index:05d}-*.parquet"))
        self._next = int(own[-1].stem.rsplit("-", 1)[1]) + 1 if own else 0
        self._buffer: list[Conversation] = []

    def add(self, rows: tuple[Conversation, ...]) -> None:
        """All rows of one conversation: they go into one part, so that it is there or not."""
        self.answer_tokens += sum(row.num_completion_tokens for row in rows)
        self._buffer += rows
        if len(self._buffer) >= self.rows_per_part:
            self.flush()

    def flush(self) -> None:
        """Write what is collected as one part."""
        if self._buffer:
            rows = sorted(self._buffer, key=lambda row: row.sample_id)
            name = conversations.part_name(self._next, self._share_index)
            conversations.write_part(self.folder / name, rows)
            self._next += 1
            self._buffer = []


@dataclasses.dataclass(frozen=True)
class Totals:
    """What the parts of a finished artifact hold."""

    names: list[str]
    rows: int
    conversations: int
    tokens: int
    trained_tokens: int
    prompt_tokens: int
    answer_tokens: int
    answer_lengths: list[int]  # tokens an answered row
    finish_reasons: dict[str, int]

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        facts = dataclasses.asdict(self)
        del facts["names"], facts["answer_lengths"]
        return facts


def add_up(folder: Path) -> Totals:
    """Read every part's columns, none of them as Python lists of ids."""
    import pyarrow.compute as pc

    paths = sorted(folder.glob(conversations.PART_GLOB))
    ids: set[str] = set()
    reasons: collections.Counter[str] = collections.Counter()
    lengths: list[int] = []
    tokens = trained = prompt = 0
    for path in paths:
        columns = conversations.read_columns(path, _COLUMNS)
        ids.update(columns["conversation_id"].to_pylist())
        reasons.update(columns["finish_reason"].to_pylist())
        lengths += columns["num_completion_tokens"].to_pylist()
        prompt += sum(columns["num_prompt_tokens"].to_pylist())
        tokens += pc.sum(pc.list_value_length(columns["input_ids"])).as_py() or 0
        spans = pc.list_flatten(columns["loss_spans"])
        ends, starts = pc.struct_field(spans, "end"), pc.struct_field(spans, "start")
        trained += pc.sum(pc.subtract(ends, starts)).as_py() or 0
    return Totals(
        names=[path.name for path in paths],
        rows=len(lengths),
        conversations=len(ids),
        tokens=tokens,
        trained_tokens=trained,
        prompt_tokens=prompt,
        answer_tokens=sum(lengths),
        answer_lengths=lengths,
        finish_reasons=dict(sorted(reasons.items())),
    )
