# SPDX-License-Identifier: Apache-2.0
"""Parquet parts of whole conversations, and their totals.

Part names carry the share that wrote them, `part-<share>-<number>.parquet`, so that several
processes write into one folder; what any of them wrote counts as done for all.
"""

import collections
import dataclasses
import math
import time
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
    """Collects conversations into parts; a killed process loses at most those of one part.

    Args:
        max_rows: a part is written once it has this many rows,
        max_age_s: or once its first row is this old.
    """

    def __init__(
        self, folder: Path, share_index: int, *, max_rows: int, max_age_s: float = math.inf
    ) -> None:
        self.folder = folder
        self._max_rows = max_rows
        self._max_age_s = max_age_s
        self._opened_s = 0.0
        self.answer_tokens = 0
        self._share_index = share_index
        own = sorted(folder.glob(f"part-{share_index:05d}-*.parquet"))
        self._next = int(own[-1].stem.rsplit("-", 1)[1]) + 1 if own else 0
        self._buffer: list[Conversation] = []

    def add(self, rows: tuple[Conversation, ...]) -> None:
        """All rows of one conversation: they go into one part, so that it is there or not."""
        self.answer_tokens += sum(row.num_completion_tokens for row in rows)
        if not self._buffer:
            self._opened_s = time.monotonic()
        self._buffer += rows
        is_old = time.monotonic() - self._opened_s >= self._max_age_s
        if len(self._buffer) >= self._max_rows or is_old:
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
    answer_lengths: list[int]  # answer tokens of each row
    row_lengths: list[int]  # tokens of each row, prompt and answers
    finish_reasons: dict[str, int]

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        facts = dataclasses.asdict(self)
        del facts["names"], facts["answer_lengths"], facts["row_lengths"]
        return facts


def add_up(folder: Path) -> Totals:
    """Read every part's columns, none of them as Python lists of ids."""
    import pyarrow.compute as pc

    paths = sorted(folder.glob(conversations.PART_GLOB))
    ids: set[str] = set()
    reasons: collections.Counter[str] = collections.Counter()
    lengths: list[int] = []
    row_lengths: list[int] = []
    trained = prompt = 0
    for path in paths:
        columns = conversations.read_columns(path, _COLUMNS)
        ids.update(columns["conversation_id"].to_pylist())
        reasons.update(columns["finish_reason"].to_pylist())
        lengths += columns["num_completion_tokens"].to_pylist()
        prompt += sum(columns["num_prompt_tokens"].to_pylist())
        row_lengths += pc.list_value_length(columns["input_ids"]).to_pylist()
        spans = pc.list_flatten(columns["loss_spans"])
        ends, starts = pc.struct_field(spans, "end"), pc.struct_field(spans, "start")
        trained += pc.sum(pc.subtract(ends, starts)).as_py() or 0
    return Totals(
        names=[path.name for path in paths],
        rows=len(lengths),
        conversations=len(ids),
        tokens=sum(row_lengths),
        trained_tokens=trained,
        prompt_tokens=prompt,
        answer_tokens=sum(lengths),
        answer_lengths=lengths,
        row_lengths=row_lengths,
        finish_reasons=dict(sorted(reasons.items())),
    )
