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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.artifacts.artifact import Artifact
from shared.artifacts.window import sidecar
from shared.contracts import layers
from shared.errors import OutputError, RetryableError, UserError
from shared.runtime.process import stopping_at_once
from shared.runtime.status import Accounting, Status
from shared.target import model as target
from shared.target.model import TargetConfig
from stages.dump import plan as plans
from stages.dump import sources
from stages.dump.config import DumpConfig
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
    source = sources.open_source(config)
    folder = target.locate_trained(config.run, config.workspace)
    target_config = target.read_config(folder, trust_remote_code=config.run.trust_remote_code)
    aux_layers = layers.resolve_aux_layers(config.run.aux_layers, target_config.num_layers)
    target_hash = target.weights_hash(folder)
    source.require_target(folder, target_hash)
    artifact = Artifact(
        config.paths.stage("dump"),
        config,
        parents=source.parents,
        inputs={"target": target_hash, **source.inputs},
    )
    if artifact.is_done():
        _remove_plan(artifact.folder)  # a kill may have come before it was removed
        return
    source.require_unchanged()
    if config.data_parallel > 1 and _run_engines(
        config, artifact, source, target_config, aux_layers
    ):
        return
    with artifact.work() as is_needed:
        if not is_needed:  # the others finished just now
            return
        plan = _settle(config, artifact, source, target_config, aux_layers)
        # Sampled answers are not the target's argmax: their agreement is reported, not required.
        min_agreement = config.min_agreement if source.is_greedy else 0.0
        facts: dict[str, Any] = {
            "aux_layers": list(aux_layers),
            "target_hash": artifact.identity["input.target"],
            "greedy": source.is_greedy,
            "backend": plan.backend,
            "layout": config.layout,
        }
        window = _offer(config, artifact, source, target_config, aux_layers, plan, facts)
        _capture(config, target_config, aux_layers, artifact.folder, plan, min_agreement, window)
        _complete(config, artifact, source, target_config, aux_layers, plan, facts, window)


def _run_engines(
    config: DumpConfig,
    artifact: Artifact,
    source: sources.RowSource,
    target_config: TargetConfig,
    aux_layers: tuple[int, ...],
) -> bool:
    """Run `data_parallel` engines, each a process of its own; whether they finished the artifact."""
    # Here, not above: an artifact that is done already must not wait for what it does not need.
    from stages.dump import parallel

    with artifact.work() as is_needed:
        if not is_needed:
            return True
        _settle(config, artifact, source, target_config, aux_layers)
    parallel.run_children(config)
    artifact.config = config.model_copy(update={"overwrite": False})
    return artifact.is_done()  # the last of the children saw every shard whole


def _settle(
    config: DumpConfig,
    artifact: Artifact,
    source: sources.RowSource,
    target_config: TargetConfig,
    aux_layers: tuple[int, ...],
) -> Plan:
    """The plan, and room on the disk for all of it, or for the window."""
    folder, fingerprint = artifact.folder, artifact.fingerprint
    earlier = plans.read_plan(folder / plans.FOLDER, fingerprint)
    backend = earlier.backend if earlier else config.backend
    if backend == "auto" or config.states is not None:
        from stages.dump.backends.choose import choose

        backend = choose(config, target_config, aux_layers)
    token_bytes = layers.state_bytes(
        1, len(aux_layers), target_config.hidden_size, config.state_dtype
    )
    accounting = Accounting()
    plan = plans.settle(
        folder,
        source.rows(target_config.folder, accounting),
        config,
        fingerprint=fingerprint,
        accounting=accounting,
        token_bytes=token_bytes,
        vocab_size=target_config.vocab_size,
        backend=backend,
    )
    tokens = plan.tokens
    if config.window_shards is not None:
        largest = max(shard.tokens for shard in plan.shards)
        tokens = min(tokens, config.window_shards * largest)
    _require_disk(folder, plan, tokens * token_bytes)
    return plan


def _offer(
    config: DumpConfig,
    artifact: Artifact,
    source: sources.RowSource,
    target_config: TargetConfig,
    aux_layers: tuple[int, ...],
    plan: Plan,
    facts: dict[str, Any],
) -> "Window | None":
    """The window of shards that train follows, told to train; None if all shards are to stay."""
    if config.window_shards is None:
        return None
    from stages.dump.shards import window

    facts["tokens"] = plan.tokens  # training may end before it has read them all
    window.offer(artifact, config, target_config, aux_layers, plan, source, facts)
    status = Status(config.paths.status(config.process_name))
    return window.Window(artifact.folder, config, plan, artifact.fingerprint, status)


def _require_disk(folder: Path, plan: Plan, total: int) -> None:
    needed = total - sum(path.stat().st_size for path in folder.rglob("*.pt"))
    free = shutil.disk_usage(folder).free
    logger.info("%d tokens in %d shards: %.3f GB", plan.tokens, len(plan.shards), total / 1e9)
    if needed > free:
        raise UserError(
            f"{folder}: the hidden states need {needed} bytes more, found {free} free.",
            code="disk-too-small",
            remedy="Free some space, lower run.max_length_tokens, use fewer prompts, or let train read "
            "beside dump (dump.window_shards).",
            facts={"needed_bytes": needed, "free_bytes": free},
        )


def _capture(
    config: DumpConfig,
    target_config: TargetConfig,
    aux_layers: tuple[int, ...],
    folder: Path,
    plan: Plan,
    min_agreement: float,
    window: "Window | None",
) -> None:
    """Capture what is missing of this process's share; with a window, as train asks for it."""
    from stages.dump.backends.choose import open_backend
    from stages.dump.shards.writer import ShardWriter, read_sidecar

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

    writer = ShardWriter(
        folder, config, target_config, len(aux_layers) + 1, min_agreement=min_agreement
    )
    with contextlib.ExitStack() as stack:
        with stopping_at_once("every whole shard is saved"):  # a large target loads for minutes
            backend = stack.enter_context(
                open_backend(plan.backend, config, target_config, aux_layers)
            )
        groups = window.groups(writer.check) if window else [missing]
        writer.capture(groups, backend, report)


def _complete(
    config: DumpConfig,
    artifact: Artifact,
    source: sources.RowSource,
    target_config: TargetConfig,
    aux_layers: tuple[int, ...],
    plan: Plan,
    facts: dict[str, Any],
    window: "Window | None",
) -> None:
    """Write the manifest, if this process is the one that sees every shard whole."""
    from stages.dump.shards.metadata import write_metadata
    from stages.dump.shards.writer import read_sidecar

    result = {shard.index: read_sidecar(artifact.folder, shard) for shard in plan.shards}
    sidecars = [found for found in result.values() if found is not None]
    missing = window.missing() if window else [i for i, found in result.items() if found is None]
    if lost := [index for index in missing if config.share.owns(index)]:
        raise _removed(artifact.folder, lost)
    if missing:
        logger.info("this process's shards are whole; %d are left to the others", len(missing))
        return
    with artifact.finishing() as is_last:
        if not is_last:
            return
        accounting = _account_for_all(config, artifact.folder, plan, result)
        checksums = {
            name: entry["sha256"] for found in sidecars for name, entry in found["files"].items()
        }
        if window:
            names, sidecars = window.names(), window.sidecars()
        else:
            names = write_metadata(
                artifact.folder, config, target_config, aux_layers, plan, source, sidecars
            )
            names += [sidecar(artifact.folder, shard.index).name for shard in plan.shards]
        artifact.finish(
            [*checksums, *names, plans.REJECTS],
            counts=accounting.as_dict(),
            facts={**_check_results(sidecars), **facts},
            checksums=checksums,
            engine=plan.backend,
        )
    _remove_plan(artifact.folder)


def _account_for_all(
    config: DumpConfig, folder: Path, plan: Plan, result: Mapping[int, dict[str, Any] | None]
) -> Accounting:
    """The counts of all shards, by their sidecars.

    Raises:
        OutputError: too many rows failed; the shards that hold them count as missing from now on.
    """
    failed = {index: found["failed"] for index, found in result.items() if found}
    try:
        return account(config, folder, plan, [row for rows in failed.values() for row in rows])
    except OutputError:
        # Their rows may be mended: another run captures these shards again.
        for index in (index for index, rows in failed.items() if rows):
            sidecar(folder, index).unlink()
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


def _remove_plan(folder: Path) -> None:
    """A finished artifact no longer needs it."""
    shutil.rmtree(folder / plans.FOLDER, ignore_errors=True)
