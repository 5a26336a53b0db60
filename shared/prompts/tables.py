# SPDX-License-Identifier: Apache-2.0
"""Tables of Parquet and Arrow as rows of plain values, a batch in memory at a time."""

import contextlib
import decimal
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_BATCH_ROWS = 256


def parquet(path: Path) -> Iterator[Any]:
    """The rows of a Parquet file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as table:
        yield from _of_batches(table.iter_batches(batch_size=_BATCH_ROWS))


def arrow(path: Path) -> Iterator[Any]:
    """The rows of the stream that `datasets` writes, or of Arrow's file format."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as memory:
        is_file = memory.read(6) == b"ARROW1"
        memory.seek(0)
        if is_file:
            table = pa.ipc.open_file(memory)
            yield from _of_batches(map(table.get_batch, range(table.num_record_batches)))
        else:
            yield from _of_batches(pa.ipc.open_stream(memory))


def _of_batches(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        batch.validate(full=True)
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield from plain_rows(batch.slice(start, _BATCH_ROWS))


def plain_rows(table: Any) -> Iterator[Any]:
    """The rows of a table as JSON has them: no padded nulls, and what is JSON by its type as a value."""
    if len(set(table.schema.names)) < len(table.schema.names):  # the last one would win
        raise ValueError(f"two columns of one name among {table.schema.names}")
    names = [field.name for field in table.schema if _has_json(field.type)]
    for row in table.to_pylist():
        decoded = {name: _decoded(row[name], table.schema.field(name).type) for name in names}
        others = {name: value for name, value in row.items() if name not in decoded}
        read = {name: value for name, value in decoded.items() if row[name] is not None}
        yield {**without_nulls(others), **read}


def _has_json(kind: Any) -> bool:
    """Whether a type is Arrow's JSON, which `datasets` takes for values of several types, or holds it."""
    inner = [kind.field(index).type for index in range(kind.num_fields)]
    return str(kind).startswith("extension<arrow.json") or any(map(_has_json, inner))


def _decoded(value: Any, kind: Any) -> Any:
    if value is None or not _has_json(kind):
        return without_nulls(value)
    if isinstance(value, list):
        return [_decoded(each, kind.field(0).type) for each in value]
    if isinstance(value, dict):
        read = {key: _decoded(inner, kind.field(key).type) for key, inner in value.items()}
        return {key: inner for key, inner in read.items() if value[key] is not None}
    # What is no JSON is left to the reader of messages, which tells what it is.
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return json.loads(value)
    return value


def without_nulls(value: Any) -> Any:
    """A table's value as JSON has it: no padded nulls, maps as objects, bytes as text."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list) and value and all(isinstance(each, tuple) for each in value):
        return {key: without_nulls(inner) for key, inner in value}  # Arrow's map
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value if b"\0" in value else value.decode()
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value
