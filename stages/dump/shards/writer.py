# SPDX-License-Identifier: Apache-2.0
"""Shards from a backend: captured, checked and written while the engine runs on.

States arrive row by row, in any order, and go straight to their place in their shard. A full shard
is checked and written on a thread of its own; each is whole with its sidecar, or not there. The
sidecar, written last, holds checksums and what the checks found, so that a later run trusts the
shard without reading gigabytes again. Memory: the shard that is filling, the one being written, and
what the engine has in flight.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from shared.artifacts.manifest_shape import Entry, FileName
from shared.io import files
from shared.io.records import Shape, read_record
from shared.runtime.process import stop_if_requested
from shared.target import model as targets
from shared.target.model import TargetConfig
from stages.dump.backends.base import Backend, Captured, Row
from stages.dump.checks.checks import ShardChecks, check_sample
from stages.dump.checks.faults import require_right
from stages.dump.config import DumpConfig
from stages.dump.plan import ShardPlan, ShardRows, probe_rows
from stages.dump.shards.layouts import write_samples

logger = logging.getLogger(__name__)


class _Sidecar(Shape):
    rows: str
    files: dict[FileName, Entry]


def sidecar(folder: Path, index: int) -> Path:
    """The small file beside a shard that says what it holds: a shard without it is not whole."""
    return folder / f"shard_{index:05d}.json"


def read_sidecar(folder: Path, plan: ShardPlan) -> dict[str, Any] | None:
    """What the sidecar says, or None where this very shard is not whole."""
    path = sidecar(folder, plan.index)
    if not path.exists():
        return None
    facts = read_record(path, _Sidecar, remedy="Delete it: its shard is then captured anew.")
    if facts.get("rows") != plan.digest:
        return None
    for name, entry in facts["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            return None
    return facts


@dataclasses.dataclass
class FillingShard:
    """A shard in the making: room for all its states, and the rows still missing."""

    plan: ShardPlan
    rows: ShardRows
    states: torch.Tensor  # [T, A+1, H] bfloat16
    probes: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    missing: set[int] = dataclasses.field(init=False)
    starts: list[int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.missing = set(range(len(self.rows.input_ids)))
        self.starts = [0]
        for ids in self.rows.input_ids:
            self.starts.append(self.starts[-1] + len(ids))

    def put(self, row: int, captured: Captured) -> None:
        """Take the states of `row`, checked.

        Raises:
            OutputError: they cannot be the target's.
        """
        place = self.states[self.starts[row] : self.starts[row + 1]]
        check_sample(
            self.rows.sample_ids[row],
            captured.states,
            num_tokens=place.shape[0],
            num_states=place.shape[1],
        )
        place.copy_(captured.states)
        if captured.logprobs is not None:
            self.probes[row] = captured.logprobs
        self.missing.discard(row)


class ShardWriter:
    """Takes planned shards from a backend into a folder."""

    def __init__(
        self,
        folder: Path,
        config: DumpConfig,
        target: TargetConfig,
        num_states: int,
        *,
        min_agreement: float,
    ) -> None:
        self.folder = folder
        self.config = config
        self.min_agreement = min_agreement
        self._shape = (num_states, target.hidden_size)
        self._target = target
        self._tensors = targets.read_tensors(target)

    def capture(
        self, shards: Sequence[ShardPlan], backend: Backend, told: Callable[[int], None]
    ) -> None:
        """Capture `shards`; `told` gets the tokens of each row as it arrives.

        Raises:
            OutputError: states that fail a check; nothing of their shard is kept.
            Stopped: a signal asked for it; every whole shard is on disk.
        """
        together = backend.streams and not self.config.drain
        groups = [shards] if together else [[shard] for shard in shards]
        with ThreadPoolExecutor(1, thread_name_prefix="eyrie-shard") as pool:
            written: Future[None] | None = None
            for group in groups:
                for shard in self._full_shards(group, backend, told):
                    if written is not None:
                        written.result()  # one waits at most: memory for two shards is enough
                    written = pool.submit(self._write, shard)
            if written is not None:
                written.result()

    def _full_shards(
        self, group: Sequence[ShardPlan], backend: Backend, told: Callable[[int], None]
    ) -> Iterator[FillingShard]:
        places: dict[int, tuple[FillingShard, int]] = {}
        with contextlib.closing(backend.run(self._rows(group, places))) as answers:
            for captured in answers:
                shard, row = places.pop(captured.row)
                shard.put(row, captured)
                told(captured.states.shape[0])
                if not shard.missing:
                    yield shard
                stop_if_requested("every whole shard is saved")

    def _rows(
        self, group: Sequence[ShardPlan], places: dict[int, tuple[FillingShard, int]]
    ) -> Iterator[Row]:
        """The rows of the shards, one after the other; `places` learns where each belongs."""
        index = 0
        for plan in group:
            rows = plan.read()
            shard = FillingShard(
                plan, rows, torch.empty(plan.tokens, *self._shape, dtype=torch.bfloat16)
            )
            probes = probe_rows(rows)
            for row, ids in enumerate(rows.input_ids):
                places[index] = (shard, row)
                index += 1
                yield Row(ids, row in probes, rows.sample_ids[row])

    def _write(self, shard: FillingShard) -> None:
        """Check and write one shard. Runs on the writer's thread."""
        started_s = time.monotonic()
        name = f"shard {shard.plan.index}"
        checks = ShardChecks(self._target, self._tensors, shard.rows, shard.states, shard.starts)
        agreement = checks.agreement()
        gap = require_right(
            name,
            checks,
            agreement,
            shard.probes,
            min_agreement=self.min_agreement,
            max_logprob_gap=self.config.max_logprob_gap,
        )
        entries = write_samples(
            self.folder, self.config.layout, shard.plan, shard.rows, shard.states, shard.starts
        )
        facts = {
            "rows": shard.plan.digest,
            "tokens": shard.plan.tokens,
            "hits": agreement.hits,
            "asked": agreement.asked,
            "logprob_gap": gap,
            "files": entries,
        }
        files.write_json(sidecar(self.folder, shard.plan.index), facts)
        size, spent_s = sum(e["bytes"] for e in entries.values()), time.monotonic() - started_s
        logger.info(
            "%s: %d samples, agreement %.4f, log-probability gap %s, %.2f GB/s checked and written",
            name,
            shard.plan.samples,
            agreement.share,
            "not told" if gap is None else f"{gap:.4f} nats",
            size / spent_s / 1e9,
        )
