# SPDX-License-Identifier: Apache-2.0
"""synth -> dump: answered conversations as Parquet (zstd, explicit schema, versioned).

Token ids are the server's own, so that what is trained is what was generated. `loss_spans` are
half-open ranges of the tokens that the target generated.

Worked example: a prompt of 3 tokens and an answer of 2 (its end-of-turn token included):
`input_ids = [7, 8, 9, 20, 2]`, `loss_spans = [{start: 3, end: 5}]`, so `loss_mask` is
`[0, 0, 0, 1, 1]`.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io.files import atomic_path, require_file

SCHEMA_VERSION = "2"
PART_GLOB = "part-*.parquet"
_MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One row. `messages` are dicts of role and content (and, later, tool calls as JSON)."""

    sample_id: str
    conversation_id: str
    source: str
    category: str
    messages: tuple[dict[str, str], ...]
    input_ids: tuple[int, ...]
    loss_spans: tuple[tuple[int, int], ...]
    finish_reason: str
    num_prompt_tokens: int
    num_completion_tokens: int

    def loss_mask(self) -> list[int]:
        """1 for each token that the target generated, 0 elsewhere; as long as `input_ids`."""
        mask = [0] * len(self.input_ids)
        for start, end in self.loss_spans:
            mask[start:end] = [1] * (end - start)
        return mask


def spans_of(mask: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The half-open ranges of ones: what `Conversation.loss_mask` was made of.

    Worked example: [0, 0, 0, 1, 1, 0, 1] gives (3, 5) and (6, 7).
    """
    edges = [i for i, pair in enumerate(itertools.pairwise([0, *mask, 0])) if pair[0] != pair[1]]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def text_columns(messages: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], ...]:
    """Messages as the Parquet columns hold them, which is text: tool calls as JSON."""
    rows = []
    for message in messages:
        row = {key: message[key] for key in _MESSAGE_KEYS if message.get(key)}
        if "tool_calls" in row:
            row["tool_calls"] = json.dumps(row["tool_calls"], ensure_ascii=False)
        rows.append({"content": "", **row})
    return tuple(rows)


def arrow_schema() -> Any:
    """The explicit pyarrow schema, its version in the metadata."""
    import pyarrow as pa

    message = pa.struct([(key, pa.string()) for key in _MESSAGE_KEYS])
    span = pa.struct([("start", pa.int32()), ("end", pa.int32())])
    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("conversation_id", pa.string()),
            ("source", pa.string()),
            ("category", pa.string()),
            ("messages", pa.list_(message)),
            ("input_ids", pa.list_(pa.int32())),
            ("loss_spans", pa.list_(span)),
            ("finish_reason", pa.string()),
            ("num_prompt_tokens", pa.int32()),
            ("num_completion_tokens", pa.int32()),
        ],
        metadata={"eyrie.schema": "conversations", "eyrie.schema_version": SCHEMA_VERSION},
    )


def part_name(index: int, share: int = 0) -> str:
    """File name of part `index` of the process that does share `share`."""
    return f"part-{share:05d}-{index:05d}.parquet"


def write_part(path: Path, rows: Sequence[Conversation]) -> None:
    """Write one Parquet part, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = []
    for row in rows:
        record = dict(vars(row))
        record["messages"] = [{k: m.get(k) for k in _MESSAGE_KEYS} for m in row.messages]
        record["loss_spans"] = [{"start": start, "end": end} for start, end in row.loss_spans]
        records.append(record)
    table = pa.Table.from_pylist(records, schema=arrow_schema())
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _conversation(record: dict[str, Any]) -> Conversation:
    if missing := [name for name, value in record.items() if value is None]:
        raise ValueError(f"sample {record['sample_id']!r}: no {', '.join(missing)}")
    if None in record["messages"] or None in record["loss_spans"] or None in record["input_ids"]:
        raise ValueError(f"sample {record['sample_id']!r}: a message, span or token is missing")
    record["messages"] = tuple(
        {key: text for key, text in message.items() if text is not None}
        for message in record["messages"]
    )
    record["input_ids"] = tuple(record["input_ids"])
    record["loss_spans"] = tuple((span["start"], span["end"]) for span in record["loss_spans"])
    row = Conversation(**record)
    ends = [0, *(bound for span in row.loss_spans for bound in span), len(row.input_ids)]
    if ends != sorted(ends) or any(start == end for start, end in row.loss_spans):
        raise ValueError(f"sample {row.sample_id!r}: loss_spans {row.loss_spans} do not fit")
    return row


def _require_schema(path: Path, found: Any) -> None:
    recorded = (found.metadata or {}).get(b"eyrie.schema_version", b"none")
    version = recorded.decode(errors="replace")
    if version != SCHEMA_VERSION or not found.equals(arrow_schema()):
        raise UserError(
            f"{path}: expected conversations of schema version {SCHEMA_VERSION}, found version "
            f"{version} with the columns {found.names}.",
            code="conversations-schema",
            remedy="Run synth again with --overwrite.",
            facts={"file": str(path), "expected": SCHEMA_VERSION, "found": version},
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A part as pyarrow's file, its schema checked; what is wrong with it as one refusal."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    require_file(path)
    try:
        with pq.ParquetFile(path) as part:
            _require_schema(path, part.schema_arrow)
            yield part
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: expected conversations in Parquet, found {type(error).__name__}: {error}.",
            code="conversations-damaged",
            remedy="Restore the file, or delete it and run synth again, which answers its rows anew.",
            facts={"file": str(path)},
        ) from error


def read_columns(path: Path, names: Sequence[str]) -> Any:
    """Some columns of a part, as a pyarrow table: what accounting needs without the token ids.

    Raises:
        UserError: not a Parquet file, or another schema or version.
    """
    with _opened(path) as part:
        columns = part.read(columns=list(names))
        columns.validate(full=True)
        return columns


def read_part(path: Path) -> Iterator[Conversation]:
    """Every row of one part, in order, checked.

    Raises:
        UserError: not a Parquet file, another schema or version, or spans outside the tokens.
    """
    with _opened(path) as part:
        for batch in part.iter_batches(batch_size=256):
            batch.validate(full=True)
            yield from map(_conversation, batch.to_pylist())


def read_conversations(folder: Path) -> Iterator[Conversation]:
    """All rows of an artifact, parts in order of their names."""
    for path in sorted(folder.glob(PART_GLOB)):
        yield from read_part(path)
