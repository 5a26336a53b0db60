# SPDX-License-Identifier: Apache-2.0
"""A report of settings and results made up, for tests of what it says."""

from typing import Any

from shared.settings import build
from stages.bench.config import BenchConfig
from stages.bench.report import gates, report
from tests.measurements import (
    baseline_requests,
    engine,
    head_requests,
    lossless,
    under_load,
)


def config(**flags: str) -> BenchConfig:
    return build(BenchConfig, {"target": "tiny", **flags})


def results(**more: Any) -> dict[str, Any]:
    return {
        "head": engine(under_load(head_requests(), wall_s=6.0)),
        "baseline": engine(under_load(baseline_requests(), wall_s=12.0), lossless=lossless()),
        **more,
    }


def made(
    settings: BenchConfig | None = None, *, serving: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    found = report.build(
        settings or config(), results(**more), measured={"prompts": "abc"}, serving=serving
    )
    found["gates"] = gates.judge(settings or config(), found, None)
    return found
