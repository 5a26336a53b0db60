# SPDX-License-Identifier: Apache-2.0
"""Shards from a backend: captured, checked and written while the engine runs on.

States arrive row by row, in any order, and go straight to their position in their shard. Full shards
are checked and written on threads of their own; each is whole with its sidecar, or absent. The
sidecar, written last, holds checksums and the results of the checks, so that a later run trusts the
shard without reading gigabytes again. A row whose states cannot be the target's is left out of its
shard, and the sidecar names it. Memory: the shard that is filling, one for each writer, and what the
engine has in flight.
"""

import collections
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from shared.artifacts.checksums import first_changed
from shared.artifacts.manifest_shape import Count, Entry, FileName
from shared.artifacts.window import sidecar
from shared.io import files
from shared.io.records import Shape, read_record_if_there
from shared.runtime.process import stop_if_requested
from shared.target.model import TargetConfig
from shared.target.tensors import read_tensors
from stages.dump.backends.base import Backend, Row
from stages.dump.checks.checks import (
    FULL_EVERY_SHARDS,
    POSITIONS_A_SHARD,
    POSITIONS_OF_MOST,
    Agreement,
    ShardChecks,
)
from stages.dump.checks.faults import require_right
from stages.dump.config import DumpConfig
from stages.dump.plan import ShardPlan, probe_rows
from stages.dump.shards.filling import FillingShard, Report
from stages.dump.shards.layouts import write_samples

logger = logging.getLogger(__name__)


class _Failure(Shape):
    row: str
    failed: str
    detail: str


class _Sidecar(Shape):
    rows: str
    tokens: Count
    hits: Count
    positions: Count
    logprob_gap: float | None
    failed: list[_Failure]
    files: dict[FileName, Entry]


def read_sidecar_file(path: Path) -> dict[str, Any] | None:
    """What a sidecar says, whether or not its shard is there; None where there is no sidecar."""
    remedy = "Delete it: its shard is then captured anew."
    return read_record_if_there(path, _Sidecar, remedy=remedy)


def read_sidecar(folder: Path, plan: ShardPlan) -> dict[str, Any] | None:
    """The sidecar of this very shard, or None where the shard is not whole."""
    facts = read_sidecar_file(sidecar(folder, plan.index))
    if facts is None or facts.get("rows") != plan.digest:
        return None
    return facts if first_changed(folder, facts) is None else None


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
        self._tensors = read_tensors(target)
        self._written: collections.deque[Future[None]] = collections.deque()

    def capture(
        self,
        groups: Iterable[Iterable[ShardPlan]],
        backend: Backend,
        report: Report,
    ) -> None:
        """Capture the shards of each group; `report` hears of each row as it arrives.

        Raises:
            OutputError: states that fail a check of their shard; nothing of the shard is kept.
            Stopped: a signal asked for it; every whole shard is on disk.
        """
        together = backend.streams and not self.config.drain
        if not together:
            groups = ([shard] for group in groups for shard in group)
        with ThreadPoolExecutor(self.config.writers, thread_name_prefix="eyrie-shard") as pool:
            for group in groups:
                for shard in self._full_shards(group, backend, report):
                    self.check(wait_above=self.config.writers - 1)
                    self._written.append(pool.submit(self._write, shard))
            self.check(wait_above=0)

    def check(self, *, wait_above: int | None = None) -> None:
        """Raise what went wrong with a shard that is being written.

        Args:
            wait_above: also wait until no more than so many are being written.
        """
        written = self._written
        while written and (
            written[0].done() or (wait_above is not None and len(written) > wait_above)
        ):
            written.popleft().result()

    def _full_shards(
        self,
        group: Iterable[ShardPlan],
        backend: Backend,
        report: Report,
    ) -> Iterator[FillingShard]:
        positions: dict[int, tuple[FillingShard, int]] = {}
        with contextlib.closing(backend.run(self._rows(group, positions))) as answers:
            for captured in answers:
                shard, row = positions.pop(captured.row)
                shard.put(row, captured)
                report(len(shard.rows.input_ids[row]), shard.failed.get(row))
                if not shard.missing:
                    yield shard
                stop_if_requested("every whole shard is saved")

    def _rows(
        self, group: Iterable[ShardPlan], positions: dict[int, tuple[FillingShard, int]]
    ) -> Iterator[Row]:
        """The rows of the shards, one after the other; `positions` learns where each belongs."""
        index = 0
        for plan in group:
            rows = plan.read()
            states = torch.empty(plan.tokens, *self._shape, dtype=torch.bfloat16)
            shard = FillingShard(plan, rows, states)
            probes = probe_rows(rows)
            for row, ids in enumerate(rows.input_ids):
                positions[index] = (shard, row)
                index += 1
                yield Row(ids, row in probes, rows.sample_ids[row])

    def _write(self, full: FillingShard) -> None:
        """Check and write one shard. Runs on a writer's thread."""
        started_s = time.monotonic()
        index, failures = full.plan.index, [full.failed[row] for row in sorted(full.failed)]
        shard, name = full.without_failed(), f"shard {index}"
        if self.config.state_dtype == "fp8":
            shard.round_to_fp8()
        agreement, gap, entries = Agreement(0, 0), None, {}
        if shard.rows.sample_ids:  # else every row failed: no file, and nothing to check
            agreement, gap = self._check(name, shard)
            entries = write_samples(
                self.folder,
                self.config.layout,
                shard.plan,
                shard.rows,
                shard.states,
                shard.starts,
                self.config.state_dtype,
            )
        facts: dict[str, Any] = {
            "rows": shard.plan.digest,
            "tokens": shard.starts[-1],
            "hits": agreement.hits,
            "positions": agreement.positions,
            "logprob_gap": gap,
            "failed": failures,
            "files": entries,
        }
        files.write_json(sidecar(self.folder, index), facts)
        size, spent_s = sum(e["bytes"] for e in entries.values()), time.monotonic() - started_s
        logger.info(
            "%s: %d samples, agreement %.4f, log-probability gap %s, %.2f GB/s checked and written",
            name,
            len(shard.rows.sample_ids),
            agreement.share,
            "not reported" if gap is None else f"{gap:.4f} nats",
            size / spent_s / 1e9,
        )
        for failure in failures:
            logger.warning("%s: sample %s left out: %s", name, failure["row"], failure["detail"])

    def _check(self, name: str, shard: FillingShard) -> tuple[Agreement, float | None]:
        """Agreement and the largest log-probability gap of a shard.

        Raises:
            OutputError: they are not those of the target.
        """
        checks = ShardChecks(self._tensors, shard.rows, shard.states, shard.starts)
        is_full = shard.plan.index % FULL_EVERY_SHARDS == 0
        agreement = checks.agreement(POSITIONS_A_SHARD if is_full else POSITIONS_OF_MOST)
        gap = require_right(
            name,
            checks,
            agreement,
            shard.probes,
            min_agreement=self.min_agreement,
            max_logprob_gap=self.config.max_logprob_gap,
        )
        return agreement, gap
