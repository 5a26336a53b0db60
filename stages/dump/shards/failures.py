# SPDX-License-Identifier: Apache-2.0
"""Rows whose states failed a check: counted, and listed in `rejects.jsonl`."""

import json
from collections.abc import Sequence
from pathlib import Path

from shared.io import files
from shared.runtime.status import Accounting
from stages.dump import plan as plans
from stages.dump.config import DumpConfig
from stages.dump.plan import Plan

_BAD = "states_"  # begins every reason for which a row's states are refused


def account(
    config: DumpConfig, folder: Path, plan: Plan, failures: Sequence[dict[str, str]]
) -> Accounting:
    """The plan's counts with the rows whose states failed, which `rejects.jsonl` lists too.

    Raises:
        OutputError: more failed than max_failed_fraction, or no row is left.
    """
    accounting = Accounting.sum_of([plan.counts])
    for failure in failures:
        accounting.ok -= 1
        accounting.fail(failure["row"], failure["failed"], failure["detail"])
    rejects = folder / plans.REJECTS
    _list_failures(rejects, failures)
    accounting.check(
        max_failed_fraction=config.max_failed_fraction, label="the rows", rejects=rejects
    )
    return accounting


def _list_failures(rejects: Path, failures: Sequence[dict[str, str]]) -> None:
    """Make `failures` the rows of bad states that `rejects.jsonl` lists, beside the plan's own."""
    with rejects.open(encoding="utf-8") as handle:
        earlier = list(handle)
    lines = [line for line in earlier if f'"failed": "{_BAD}' not in line]
    lines += [json.dumps(failure, ensure_ascii=True) + "\n" for failure in failures]
    if lines != earlier:
        files.write_text(rejects, "".join(lines))
