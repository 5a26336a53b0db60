# SPDX-License-Identifier: Apache-2.0
"""The manifest, written by the process that sees every shard whole."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.artifacts.window import sidecar
from shared.errors import OutputError, RetryableError
from shared.runtime.status import Accounting
from stages.dump import plan as plans
from stages.dump.job import Job
from stages.dump.plan import Plan
from stages.dump.shards.failures import account
from stages.dump.shards.metadata import write_metadata
from stages.dump.shards.window import Window
from stages.dump.shards.writer import read_sidecar

logger = logging.getLogger(__name__)


def complete(job: Job, plan: Plan, facts: Mapping[str, Any], window: Window | None) -> bool:
    """Write the manifest if every shard is whole; whether the artifact is finished.

    Args:
        facts: of the manifest that do not depend on the states.

    Raises:
        OutputError: too many rows failed.
        RetryableError: a shard of this process's share is gone.
    """
    result = {shard.index: read_sidecar(job.folder, shard) for shard in plan.shards}
    sidecars = [found for found in result.values() if found is not None]
    missing = window.missing() if window else [i for i, found in result.items() if found is None]
    if lost := [index for index in missing if job.config.share.owns(index)]:
        raise _removed(job.folder, lost)
    if missing:
        logger.info("this process's shards are whole; %d are left to the others", len(missing))
        return False
    with job.artifact.finishing() as is_last:
        if not is_last:
            return False
        accounting = _account_for_all(job, plan, result)
        checksums = {
            name: entry["sha256"] for found in sidecars for name, entry in found["files"].items()
        }
        if window:
            names, sidecars = window.names(), window.sidecars()
        else:
            names = write_metadata(job, plan, sidecars)
            names += [sidecar(job.folder, shard.index).name for shard in plan.shards]
        job.artifact.finish(
            [*checksums, *names, plans.REJECTS],
            counts=accounting.as_dict(),
            facts={**_check_results(sidecars), **facts},
            checksums=checksums,
            engine=plan.backend,
        )
    return True


def _account_for_all(
    job: Job, plan: Plan, result: Mapping[int, dict[str, Any] | None]
) -> Accounting:
    """The counts of all shards, by their sidecars.

    Raises:
        OutputError: too many rows failed; the shards that hold them count as missing from now on.
    """
    failed = {index: found["failed"] for index, found in result.items() if found}
    try:
        rows = [row for rows in failed.values() for row in rows]
        return account(job.config, job.folder, plan, rows)
    except OutputError:
        # Their rows may be mended: another run captures these shards again.
        for index in (index for index, rows in failed.items() if rows):
            sidecar(job.folder, index).unlink()
        raise


def _removed(folder: Path, shards: list[int]) -> RetryableError:
    return RetryableError(
        f"{sidecar(folder, shards[0])}: expected a whole shard, as it was written; somebody removed "
        "or changed its files meanwhile.",
        code="shard-removed",
        remedy="Run the same command again: the shard is captured again.",
        facts={"shards": shards},
    )


def _check_results(sidecars: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tokens that were kept, and what the checks of all shards say together."""
    positions = sum(facts["positions"] for facts in sidecars)
    gaps = [facts["logprob_gap"] for facts in sidecars if facts["logprob_gap"] is not None]
    return {
        "tokens": sum(facts["tokens"] for facts in sidecars),
        "agreement": sum(f["hits"] for f in sidecars) / positions if positions else None,
        "logprob_gap": max(gaps, default=None),
    }
