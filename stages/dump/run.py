# SPDX-License-Identifier: Apache-2.0
"""Conversations -> the target's hidden states -> `.pt` files.

In: synth's Parquet, or finished conversations. Out: shards of [T, A+1, H] bfloat16 (or fp8) with ids
and masks. Cost: one prefill of every row, and T * (A+1) * H * 2 bytes of disk (less with fp8).
Shards are planned from the rows alone, so a killed run continues with the first shard that is not
whole, and several processes can share the shards.
"""

import contextlib
import logging
import shutil
from typing import TYPE_CHECKING, Any

from shared.errors import UserError
from shared.io import files
from shared.runtime.process import stopping_at_once
from shared.runtime.status import Accounting, Status
from shared.runtime.wording import counted
from stages.dump import plan as plans
from stages.dump.config import DumpConfig
from stages.dump.job import Job, open_job
from stages.dump.plan import Plan
from stages.dump.shards.failures import account

if TYPE_CHECKING:
    from stages.dump.shards.window import Window


logger = logging.getLogger(__name__)


def run(config: DumpConfig) -> None:
    """The stage, top to bottom.

    Raises:
        UserError: no finished synth artifact, a changed target, too little disk.
        OutputError: states that fail their checks, or no row left.
    """
    job = open_job(config)
    if job.artifact.is_done():
        _remove_plan(job)  # a kill may have come before it was removed
        return
    job.source.require_unchanged()
    if config.data_parallel > 1 and _run_engines(job):
        return
    with job.artifact.work() as is_needed:
        if not is_needed:  # the others finished just now
            return
        # Here, not above: an artifact that is done already must not wait for what it does not need.
        from stages.dump.shards.finish import complete

        plan = _settle(job)
        facts: dict[str, Any] = {
            "aux_layers": list(job.aux_layers),
            "target_hash": job.artifact.identity["input.target"],
            "greedy": job.source.is_greedy,
            "backend": plan.backend,
            "layout": config.layout,
        }
        window = _offer(job, plan, facts)
        _capture(job, plan, window)
        if complete(job, plan, facts, window):
            _remove_plan(job)


def _run_engines(job: Job) -> bool:
    """Run `data_parallel` engines, each a process of its own; whether they finished the artifact."""
    from stages.dump import parallel

    artifact = job.artifact
    with artifact.work() as is_needed:
        if not is_needed:
            return True
        _settle(job)
    parallel.run_children(job.config)
    artifact.config = job.config.model_copy(update={"overwrite": False})
    return artifact.is_done()  # the last of the children saw every shard whole


def _settle(job: Job) -> Plan:
    """The plan, and room on the disk for all of it, or for the window."""
    config, fingerprint = job.config, job.artifact.fingerprint
    earlier = plans.read_plan(job.folder / plans.FOLDER, fingerprint)
    backend = earlier.backend if earlier else config.backend
    if backend == "auto" or config.states is not None:
        from stages.dump.backends.choose import choose

        backend = choose(config, job.target, job.aux_layers)
    accounting = Accounting()
    plan = plans.settle(
        job.folder,
        job.source.rows(job.target.folder, accounting),
        config,
        fingerprint=fingerprint,
        accounting=accounting,
        token_bytes=job.token_bytes,
        vocab_size=job.target.vocab_size,
        backend=backend,
    )
    _require_disk(job, plan)
    return plan


def _require_disk(job: Job, plan: Plan) -> None:
    tokens = plan.tokens
    if (window_shards := job.config.window_shards) is not None:
        tokens = min(tokens, window_shards * max(shard.tokens for shard in plan.shards))
    total = tokens * job.token_bytes
    needed = total - files.bytes_below(job.folder, "*.pt")
    free = shutil.disk_usage(job.folder).free
    logger.info(
        "%d tokens in %s: %.3f GB", plan.tokens, counted(len(plan.shards), "shard"), total / 1e9
    )
    if needed > free:
        raise UserError(
            f"{job.folder}: the hidden states need {needed} bytes more, found {free} free.",
            code="disk-too-small",
            remedy="Free some space, lower run.max_length_tokens, use fewer prompts, or let train read "
            "beside dump (dump.window_shards).",
            facts={"needed_bytes": needed, "free_bytes": free},
        )


def _offer(job: Job, plan: Plan, facts: dict[str, Any]) -> "Window | None":
    """The window of shards that train follows, told to train; None if all shards are to stay."""
    if job.config.window_shards is None:
        return None
    from stages.dump.shards import window

    facts["tokens"] = plan.tokens  # training may end before it has read them all
    window.offer(job, plan, facts)
    status = Status(job.config.paths.status(job.config.process_name))
    return window.Window(job.folder, job.config, plan, job.artifact.fingerprint, status)


def _capture(job: Job, plan: Plan, window: "Window | None") -> None:
    """Capture what is missing of this process's share; with a window, as train asks for it."""
    from stages.dump.backends.choose import open_backend
    from stages.dump.shards.writer import ShardWriter, read_sidecar

    config, folder = job.config, job.folder
    own = [shard for shard in plan.shards if config.share.owns(shard.index)]
    missing = [shard for shard in own if read_sidecar(folder, shard) is None]
    if len(missing) < len(own):
        logger.info("%d of %d shards are there already", len(own) - len(missing), len(own))
    status = Status(config.paths.status(config.process_name))
    status.started()
    if not (missing or window):
        return
    total = sum(shard.tokens for shard in own)
    done = total - sum(shard.tokens for shard in missing)
    failures: list[dict[str, str]] = []

    def report(tokens: int, failure: dict[str, str] | None) -> None:
        nonlocal done
        done += tokens
        if window:
            window.tell()
        else:
            status.progress(done, total, "tokens")
        if failure is not None:
            failures.append(failure)
            # An engine's time is dear. Files are read to the end, so that all bad ones are named;
            # but train must not wait for a row that will not come.
            if plan.backend != "files" or window:
                account(config, folder, plan, failures)

    # Sampled answers are not the target's argmax: their agreement is reported, not required.
    min_agreement = config.min_agreement if job.source.is_greedy else 0.0
    num_states = len(job.aux_layers) + 1
    writer = ShardWriter(folder, config, job.target, num_states, min_agreement=min_agreement)
    with contextlib.ExitStack() as stack:
        with stopping_at_once("every whole shard is saved"):  # a large target loads for minutes
            opened = open_backend(plan.backend, config, job.target, job.aux_layers)
            backend = stack.enter_context(opened)
        groups = window.groups(writer.check) if window else [missing]
        writer.capture(groups, backend, report)


def _remove_plan(job: Job) -> None:
    """A finished artifact no longer needs it."""
    shutil.rmtree(job.folder / plans.FOLDER, ignore_errors=True)
