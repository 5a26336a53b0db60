# SPDX-License-Identifier: Apache-2.0
"""Which rows go into which shard: settled before anything is captured, the same in every run.

In: rows, from synth's Parquet or from plain conversations. Out, in `<artifact>/plan/`: one small
Parquet file a shard with the token ids and masks that it will hold, and `plan.json`, written last.
So no process keeps more than a shard's ids in memory, a resumed run reads nothing twice, and
several processes take their shards from one plan.
"""

import array
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shared.artifacts.manifest_shape import Count, Counts
from shared.artifacts.unfinished import LOCK
from shared.artifacts.window import sample_hash
from shared.contracts.conversations import Conversation
from shared.errors import RetryableError, UserError
from shared.io import files
from shared.io.files import atomic_path
from shared.io.records import Shape, read_record
from shared.runtime.process import lock, stop_if_requested
from shared.runtime.status import Accounting
from stages.dump.config import DumpConfig

FOLDER = "plan"
PLAN = "plan.json"
REJECTS = "rejects.jsonl"
# The engine's own log-probabilities of a row need memory for each of its tokens.
MAX_PROBE_TOKENS = 512

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ShardRows:
    """The rows of one shard, in order."""

    sample_ids: list[str]
    input_ids: list[list[int]]
    loss_masks: list[list[int]]


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """One shard before it is captured.

    Attributes:
        index: its number, from 0.
        first: number of its first sample among all samples.
        samples, tokens: how many it holds.
        digest: SHA-256 of its rows.
        path: the Parquet file with the rows.
    """

    index: int
    first: int
    samples: int
    tokens: int
    digest: str
    path: Path

    def read(self) -> ShardRows:
        """The rows.

        Raises:
            RetryableError: the file is gone.
            UserError: it holds other rows.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self.path.exists():
            raise RetryableError(
                f"{self.path}: the rows of a planned shard were removed.",
                code="plan-rows-gone",
                remedy="Run the same command again: the plan is made anew.",
                facts={"file": str(self.path)},
            )
        files.require_file(self.path)
        try:
            table = pq.read_table(self.path)
            table.validate(full=True)
            rows = ShardRows(**table.to_pydict())
            digest = _digest(rows)
        except (OSError, pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise self._damaged(str(error)) from error
        if digest != self.digest:
            raise self._damaged(f"other rows than {PLAN} names")
        return rows

    def _damaged(self, found: str) -> UserError:
        return UserError(
            f"{self.path}: expected the rows of a planned shard, found: {found}.",
            code="plan-rows-damaged",
            remedy=f"Delete the folder {self.path.parent} and run dump again.",
            facts={"file": str(self.path)},
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """All shards, what became of the rows, and the backend that was settled on."""

    shards: list[ShardPlan]
    counts: dict[str, Any]
    backend: str

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


class _PlannedShard(Shape):
    index: Count
    first: Count
    samples: Count
    tokens: Count
    digest: str


class _PlanFile(Shape):
    fingerprint: str
    backend: str
    counts: Counts
    shards: list[_PlannedShard]


def _digest(rows: ShardRows) -> str:
    text = json.dumps(dataclasses.asdict(rows), separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_plan(folder: Path, fingerprint: str) -> Plan | None:
    """The plan in `folder`, or None where there is no whole one of this artifact's fingerprint."""
    path = folder / PLAN
    if not path.exists():
        return None
    raw = read_record(path, _PlanFile, remedy=f"Delete the folder {folder} and run dump again.")
    if raw["fingerprint"] != fingerprint:
        return None
    names = ("index", "first", "samples", "tokens", "digest")
    shards = [
        ShardPlan(**{name: shard[name] for name in names}, path=_shard_path(folder, shard["index"]))
        for shard in raw["shards"]
    ]
    if not all(shard.path.exists() for shard in shards):
        return None
    return Plan(shards, raw["counts"], raw["backend"])


def settle(
    folder: Path,
    rows: Iterable[Conversation],
    config: DumpConfig,
    *,
    fingerprint: str,
    accounting: Accounting,
    token_bytes: int,
    vocab_size: int,
    backend: str,
) -> Plan:
    """The plan of the artifact in `folder`: read, or made by the first process that asks.

    Args:
        fingerprint: of the artifact that the plan is for.
        accounting: counts the rows; it may hold those that could not be read already.
        token_bytes: bytes of the states of one token.
        backend: what captures, to be remembered.

    Raises:
        UserError: there is no row, or too many of `conversations` cannot be used.
        OutputError: none of the others is usable, or too many failed.
    """
    with lock(folder / f"{LOCK}-plan", wait=True):
        found = read_plan(folder / FOLDER, fingerprint)
        if found is not None and (folder / REJECTS).exists():
            return found
        shards = list(_write_shards(folder, rows, config, accounting, token_bytes, vocab_size))
        accounting.write_rejects(folder / REJECTS)
        limit, rejects = config.max_failed_fraction, folder / REJECTS
        if config.conversations is None:
            accounting.check(max_failed_fraction=limit, label="the rows", rejects=rejects)
        else:  # nothing was made of them yet: the input is at fault
            accounting.check_input(
                usable=accounting.ok,
                max_failed_fraction=limit,
                label=config.conversations,
                rejects=rejects,
            )
        plan = Plan(shards, accounting.as_dict(), backend)
        _write_plan(folder / FOLDER, plan, fingerprint)
    return plan


def _write_plan(folder: Path, plan: Plan, fingerprint: str) -> None:
    """What `read_plan` reads."""
    listed = [dataclasses.asdict(shard) for shard in plan.shards]
    for shard in listed:
        del shard["path"]
    value = {"counts": plan.counts, "shards": listed, "backend": plan.backend}
    files.write_json(folder / PLAN, {"fingerprint": fingerprint, **value})


def _write_shards(
    folder: Path,
    rows: Iterable[Conversation],
    config: DumpConfig,
    accounting: Accounting,
    token_bytes: int,
    vocab_size: int,
) -> Iterator[ShardPlan]:
    """Rows in the order they come (for a window, in that of a hash), cut to about `shard_bytes`."""
    index = first = tokens = 0
    shard = ShardRows([], [], [])
    usable = _usable(rows, config, accounting, vocab_size)
    for sample_id, ids, mask in _by_hash(usable) if config.window_shards else usable:
        shard.sample_ids.append(sample_id)
        shard.input_ids.append(ids)
        shard.loss_masks.append(mask)
        tokens += len(ids)
        if tokens * token_bytes >= config.shard_bytes:
            yield _write_shard(folder / FOLDER, index, first, tokens, shard)
            stop_if_requested("the plan is not made yet")
            index, first, tokens = index + 1, first + len(shard.sample_ids), 0
            shard = ShardRows([], [], [])
    if shard.sample_ids:
        yield _write_shard(folder / FOLDER, index, first, tokens, shard)


def _by_hash(
    rows: Iterable[tuple[str, list[int], list[int]]],
) -> Iterator[tuple[str, list[int], list[int]]]:
    """The same rows, ordered as train holds samples out, so that few shards hold what it keeps.

    Costs 5 bytes of memory per token: 2 GB for 400 million tokens.
    """
    held = [
        (sample_hash(name), name, array.array("i", ids), bytes(mask)) for name, ids, mask in rows
    ]
    for _, name, ids, mask in sorted(held, key=lambda row: row[:2]):
        yield name, ids.tolist(), list(mask)


def _usable(
    rows: Iterable[Conversation], config: DumpConfig, accounting: Accounting, vocab_size: int
) -> Iterator[tuple[str, list[int], list[int]]]:
    """(sample id, token ids, loss mask) of each row that can be trained on."""
    limit = config.run.max_length_tokens
    for row in rows:
        ids, mask = list(row.input_ids), row.loss_mask()
        if len(ids) > limit and config.over_long == "skip":
            accounting.skip(row.sample_id, "too_long", f"{len(ids)} > {limit}")
            continue
        ids, mask = ids[:limit], mask[:limit]
        if not any(mask):
            accounting.skip(row.sample_id, "no_trained_token")
        elif max(ids) >= vocab_size or min(ids) < 0:
            accounting.fail(row.sample_id, "token_outside_vocabulary", str(max(ids)))
        else:
            accounting.ok += 1
            yield row.sample_id, ids, mask


def _shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard_{index:05d}.parquet"


def _write_shard(folder: Path, index: int, first: int, tokens: int, rows: ShardRows) -> ShardPlan:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "sample_ids": pa.array(rows.sample_ids, pa.string()),
        "input_ids": pa.array(rows.input_ids, pa.list_(pa.int32())),
        "loss_masks": pa.array(rows.loss_masks, pa.list_(pa.uint8())),
    }
    path = _shard_path(folder, index)
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")
    return ShardPlan(index, first, len(rows.sample_ids), tokens, _digest(rows), path)


def probe_rows(rows: ShardRows) -> set[int]:
    """Which rows of a shard are asked for their log-probabilities: far apart, and not long.

    Worked example, lengths [600, 40, 1, 30, 50]: rows 1 and 4, the first and the last that have
    something to predict and at most 512 tokens.
    """
    lengths = [len(ids) for ids in rows.input_ids]
    fitting = [i for i, length in enumerate(lengths) if 1 < length <= MAX_PROBE_TOKENS]
    if not fitting:
        return {min(range(len(lengths)), key=lengths.__getitem__)}
    return {fitting[0], fitting[-1]}
