# SPDX-License-Identifier: Apache-2.0
"""One engine, from its start or as it stands, to its raw measurement.

In: a plan and how to draft. Out: for each load every answer's tokens, times and draft counters, and the
wall time; beside it what `/metrics` said before and after (`raw/<engine>.<load>.<part>.{before,after}.prom`),
so that anybody can compute the figures again. Costs one engine start and the answers.

All prompts run as one closed loop, since a group for each category would drain the batch once for
each and spoil the throughput. A server that reports no counts by request (vLLM before 0.30) is
measured category by category; then every server of the measurement is.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io import files
from shared.runtime.process import stop_if_requested
from shared.vllm.http import Address
from shared.vllm.measured_rows import Conversation, warmup
from stages.bench.lossless import judge as lossless
from stages.bench.measure import machine, plans
from stages.bench.measure.client import Server
from stages.bench.measure.loads import Load
from stages.bench.measure.plans import Plan, Speculative
from stages.bench.measure.server import serve

Raw = dict[str, Any]


def _address(
    plan: Plan, name: str, speculative: Speculative, while_starting: Callable[[], None] | None
) -> contextlib.AbstractContextManager[Address]:
    """The server for an engine's name: started here, or the existing one."""
    if not plan.config.endpoint:
        return serve(plan, speculative, while_starting=while_starting)
    field = "baseline_endpoint" if name == "baseline" else "endpoint"
    variable = f"EYRIE_{field.upper()}_KEY"  # its key is never a flag: process lists show those
    address = Address(getattr(plan.config, field), os.environ.get(variable, ""), variable)
    return contextlib.nullcontext(address)


@dataclass
class _Measurement:
    """One server under a plan."""

    server: Server
    name: str
    plan: Plan
    depth: int
    folder: Path
    on_answered: Callable[[], None]

    def warm_up(self, load: Load) -> bool:
        """Whether the server counts drafts by request."""
        max_tokens = min(plans.WARMUP_TOKENS, load.max_tokens)
        rows = self.server.play(warmup(), load, max_tokens=max_tokens)
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
                f"{self.server.address.base_url}: expected a server that drafts {self.depth} tokens "
                f"({self.name}), found one that drafts {found}.",
                code="endpoint-draft-length",
                remedy="Set bench.num_speculative_tokens to it, or give the right endpoint.",
                facts={"expected": self.depth, "found": found},
            )

    def measure(self, index: int, load: Load, *, one_loop: bool) -> Raw:
        groups = plans.groups(self.plan.conversations, one_loop=one_loop)
        segments = [
            self._segment(f"{self.name}.{index}.{part}", category, members, load)
            for part, (category, members) in enumerate(groups)
        ]
        return {"load": asdict(load), "segments": segments}

    def _segment(
        self, label: str, category: str | None, conversations: list[Conversation], load: Load
    ) -> Raw:
        before = self.server.read_idle()
        files.write_text(self.folder / "raw" / f"{label}.before.prom", before.text)
        started_s = time.perf_counter()
        rows = self.server.play(
            conversations, load, max_tokens=load.max_tokens, on_answered=self.on_answered
        )
        wall_s = time.perf_counter() - started_s
        after = self.server.read_idle(answered=before.answered + len(rows))
        files.write_text(self.folder / "raw" / f"{label}.after.prom", after.text)
        stop_if_requested("a measurement is only kept whole")
        return {
            "category": category,
            "wall_s": wall_s,
            "queue_s": after.queue_s - before.queue_s,
            "counters_before": before.counters and asdict(before.counters),
            "counters_after": after.counters and asdict(after.counters),
            "requests": rows,
        }


def measure(
    plan: Plan,
    name: str,
    speculative: Speculative,
    folder: Path,
    *,
    others: Mapping[str, Raw],
    on_answered: Callable[[], None] = lambda: None,
    while_starting: Callable[[], None] | None = None,
) -> Raw:
    """The raw measurement of one engine, also written to `folder`.

    Args:
        others: the drafting engines' raw measurements where this is the baseline.
        on_answered: called after each conversation that is measured.
        while_starting: a check that runs beside the start of a server of our own.

    Raises:
        UserError: the server refuses the plan, or is not what the recipe says.
        RetryableError: it does not answer, died, or is used by somebody else.
    """
    # Before this engine's own start, so that whatever works is somebody else's; an endpoint is elsewhere.
    busy_share = None if plan.config.endpoint else machine.busy_share()
    started_s = time.perf_counter()
    depth = plans.depth_of(speculative)
    with _address(plan, name, speculative, while_starting) as address:
        server = Server(
            address,
            request_timeout_s=plan.config.request_timeout_s,
            template_kwargs=plan.config.run.template_kwargs,
            depth=depth,
        )
        version = server.connect()
        start_s = time.perf_counter() - started_s
        measurement = _Measurement(server, name, plan, depth, folder, on_answered)
        measurement.check_drafts()
        measured = []
        by_request = all(_is_by_request(other) for other in others.values())
        for index, load in enumerate(plan.loads):
            counts = measurement.warm_up(load)
            if speculative:
                by_request = counts
            measured.append(measurement.measure(index, load, one_loop=by_request))
        raw: Raw = {"vllm_version": version, "start_s": start_s, "busy_share": busy_share}
        raw["loads"] = measured
        if others:
            raw["lossless"] = lossless.judged(raw, others, server.score)
    files.write_json(folder / "raw" / f"{name}.json", raw)
    return raw


def _is_by_request(raw: Raw) -> bool:
    return all(
        segment["category"] is None for entry in raw["loads"] for segment in entry["segments"]
    )
