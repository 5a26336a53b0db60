# SPDX-License-Identifier: Apache-2.0
"""A measurement over HTTP: of servers started here, one after another, or of existing ones.

In: plans. Out: raw measurements as the in-process engine's, and beside them what `/metrics` said
before and after each (`raw/<engine>.<cell>.<part>.{before,after}.prom`), so that anybody can compute the
figures again. The surprise: a server that reports no counts by request is measured category by
category, which drains the batch in between; then every server of the measurement is.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io import files
from shared.runtime.process import stop_if_requested
from stages.bench.config import BenchConfig
from stages.bench.lossless import judge as lossless
from stages.bench.measure import plans
from stages.bench.measure.cells import Cell, Conversation
from stages.bench.measure.client import Server
from stages.bench.measure.server import serve

Plan = Mapping[str, Any]
Raw = dict[str, Any]

logger = logging.getLogger(__name__)


def endpoint_key(name: str) -> str:
    """The key of `endpoint` or `baseline_endpoint`; never a flag, so that no process list shows it."""
    return os.environ.get(f"EYRIE_{name.upper()}_KEY", "")


@contextlib.contextmanager
def _server(config: BenchConfig, name: str, plan: Plan) -> Iterator[Server]:
    url = config.baseline_endpoint if name == "baseline" else config.endpoint
    if not config.endpoint:
        with serve(
            plan,
            startup_timeout_s=config.startup_timeout_s,
            request_timeout_s=config.request_timeout_s,
        ) as server:
            yield server
        return
    which = "baseline_endpoint" if name == "baseline" else "endpoint"
    yield Server(
        str(url),
        endpoint_key(which),
        request_timeout_s=config.request_timeout_s,
        chat_template_kwargs=plan["chat_template_kwargs"],
    )


@dataclass
class _Measurement:
    """One server under a plan."""

    server: Server
    name: str
    plan: Plan
    folder: Path

    @property
    def depth(self) -> int:
        return plans.depth_of(self.plan["speculative"])

    def warm_up(self, cell: Cell) -> bool:
        """Whether the server counts drafts by request."""
        warm = [Conversation.from_json(raw) for raw in self.plan["warmup"]]
        longest = min(plans.WARMUP_TOKENS, cell.max_tokens)
        rows = self.server.play(warm, cell, max_tokens=longest, depth=self.depth)
        return all(row["counters"] is not None for row in rows)

    def check_drafts(self) -> None:
        """Refuse a server that drafts otherwise than the recipe says.

        Raises:
            UserError: with its draft length.
        """
        counters = self.server.read_idle().counters
        found = len(counters.num_accepted_tokens_per_pos) if counters else 0
        if found != self.depth:
            raise UserError(
                f"{self.server.base_url}: expected a server that drafts {self.depth} tokens "
                f"({self.name}), found one that drafts {found}. Set bench.num_speculative_tokens, or "
                "give the right endpoint."
            )

    def measure(self, at: int, cell: Cell, *, one_loop: bool) -> Raw:
        conversations = [Conversation.from_json(raw) for raw in self.plan["conversations"]]
        groups = plans.groups(conversations, one_loop=one_loop)
        segments = [
            self._segment(f"{self.name}.{at}.{part}", category, members, cell)
            for part, (category, members) in enumerate(groups)
        ]
        return {"cell": asdict(cell), "segments": segments}

    def _segment(
        self, label: str, category: str | None, conversations: list[Conversation], cell: Cell
    ) -> Raw:
        before = self.server.read_idle()
        clock = time.perf_counter()
        rows = self.server.play(conversations, cell, max_tokens=cell.max_tokens, depth=self.depth)
        wall_s = time.perf_counter() - clock
        after = self.server.read_idle(answered=before.answered + len(rows))
        for when, reading in (("before", before), ("after", after)):
            files.write_text(self.folder / "raw" / f"{label}.{when}.prom", reading.text)
        stop_if_requested("a measurement is only kept whole")
        return {
            "category": category,
            "wall_s": wall_s,
            "counters_before": before.counters and asdict(before.counters),
            "counters_after": after.counters and asdict(after.counters),
            "requests": rows,
        }


def measure(
    config: BenchConfig,
    name: str,
    plan: Plan,
    folder: Path,
    *,
    others: Mapping[str, Raw],
) -> Raw:
    """One server from its start, or as it stands, to its raw measurement.

    Args:
        others: the drafting engines' raw measurements where this is the baseline.

    Raises:
        UserError: the server refuses the plan, or is not what the recipe says.
        RetryableError: it does not answer, died, or is used by somebody else.
    """
    started_s = time.perf_counter()
    with _server(config, name, plan) as server:
        version = server.connect()
        start_s = time.perf_counter() - started_s
        measurement = _Measurement(server, name, plan, folder)
        measurement.check_drafts()
        measured = []
        by_request = all(_by_request(other) for other in others.values())
        for at, raw_cell in enumerate(plan["cells"]):
            cell = Cell(**raw_cell)
            counts = measurement.warm_up(cell)
            if plan["speculative"]:
                by_request = counts
            measured.append(measurement.measure(at, cell, one_loop=by_request))
        raw: Raw = {"vllm_version": version, "start_s": start_s, "cells": measured}
        if others:
            raw["lossless"] = lossless.judged(raw, others, server.score)
    files.write_json(folder / "raw" / f"{name}.json", raw)
    return raw


def _by_request(raw: Raw) -> bool:
    return all(segment["category"] is None for cell in raw["cells"] for segment in cell["segments"])
