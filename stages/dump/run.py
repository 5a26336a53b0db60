# SPDX-License-Identifier: Apache-2.0
"""Conversations -> the target's hidden states -> `.pt` files.

In: synth's Parquet, or finished conversations. Out: shards of [T, A+1, H] bfloat16 with ids and
masks. Cost: one prefill of every row, and T * (A+1) * H * 2 bytes of disk. Shards are planned from
the rows alone, so a killed run continues with the first shard that is not whole, and several
processes share the shards out.
"""

import logging
import shutil
from pathlib import Path

from shared.artifacts.manifest import Artifact
from shared.contracts import layers
from shared.errors import RetryableError, UserError
from shared.runtime.status import Accounting, Status
from shared.target import model as target
from shared.target.model import TargetConfig
from stages.dump import plan as plans
from stages.dump import sources
from stages.dump.config import DumpConfig
from stages.dump.plan import Plan

logger = logging.getLogger(__name__)


def run(config: DumpConfig) -> None:
    """The stage, top to bottom.

    Raises:
        UserError: no finished synth artifact, a changed target, too little disk.
        OutputError: states that fail their checks, or no row left.
    """
    source = sources.open_source(config)
    folder = target.locate_trained(config.run, config.workspace)
    target_config = target.read_config(folder)
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
        _forget_plan(artifact.folder)  # a kill may have come before its turn
        return
    source.require_unchanged()
    if config.data_parallel > 1:
        # Here, not above: an artifact that is done already must not wait for what it does not need.
        from stages.dump import parallel

        with artifact.work() as is_needed:
            if not is_needed:
                return
            _settle(config, artifact, source, target_config, aux_layers)
        parallel.run_children(config)
        artifact.config = config.model_copy(update={"overwrite": False})
        if artifact.is_done():  # the last of the children saw every shard whole
            return
    with artifact.work() as is_needed:
        if not is_needed:  # the others finished just now
            return
        plan = _settle(config, artifact, source, target_config, aux_layers)
        # Sampled answers are not the target's argmax, so their agreement is told and not asked for.
        least = config.min_agreement if source.is_greedy else 0.0
        _capture(config, target_config, aux_layers, artifact.folder, plan, least)
        _complete(config, artifact, source, target_config, aux_layers, plan)


def _settle(
    config: DumpConfig,
    artifact: Artifact,
    source: sources.RowSource,
    target_config: TargetConfig,
    aux_layers: tuple[int, ...],
) -> Plan:
    """The plan, and room for it on the disk."""
    folder, fingerprint = artifact.folder, artifact.fingerprint
    found = plans.read_plan(folder / plans.FOLDER, fingerprint)
    backend = found.backend if found else config.backend
    if backend == "auto" or config.states is not None:
        from stages.dump.backends.choose import choose

        backend = choose(config, target_config, aux_layers)
    accounting = Accounting()
    plan = plans.settle(
        folder,
        source.rows(target_config.folder, accounting),
        config,
        fingerprint=fingerprint,
        accounting=accounting,
        token_bytes=layers.state_bytes(1, len(aux_layers), target_config.hidden_size),
        vocab_size=target_config.vocab_size,
        backend=backend,
    )
    _require_disk(folder, plan, len(aux_layers), target_config.hidden_size)
    return plan


def _require_disk(folder: Path, plan: Plan, num_aux: int, hidden_size: int) -> None:
    needed = layers.state_bytes(plan.tokens, num_aux, hidden_size)
    held = sum(path.stat().st_size for path in folder.rglob("*.pt"))
    free = shutil.disk_usage(folder).free
    logger.info("%d tokens in %d shards: %.3f GB", plan.tokens, len(plan.shards), needed / 1e9)
    if needed - held > free:
        raise UserError(
            f"{folder}: the hidden states need {needed - held} bytes more, found {free} free. Free "
            "some space, lower run.max_length_tokens, or take fewer prompts."
        )


def _capture(
    config: DumpConfig,
    target_config: TargetConfig,
    aux_layers: tuple[int, ...],
    folder: Path,
    plan: Plan,
    min_agreement: float,
) -> None:
    """Capture what is missing of this process's share."""
    from stages.dump.backends.choose import open_backend
    from stages.dump.shards.writer import ShardWriter, read_sidecar

    own = [shard for shard in plan.shards if config.share.owns(shard.index)]
    missing = [shard for shard in own if read_sidecar(folder, shard) is None]
    if len(missing) < len(own):
        logger.info("%d of %d shards are there already", len(own) - len(missing), len(own))
    status = Status(config.paths.status(config.process_name))
    status.started()
    if not missing:
        return
    total = sum(shard.tokens for shard in own)
    done = total - sum(shard.tokens for shard in missing)

    def told(tokens: int) -> None:
        nonlocal done
        done += tokens
        status.progress(done, total, "tokens")

    writer = ShardWriter(
        folder, config, target_config, len(aux_layers) + 1, min_agreement=min_agreement
    )
    with open_backend(plan.backend, config, target_config, aux_layers) as backend:
        writer.capture(missing, backend, told)


def _complete(
    config: DumpConfig,
    artifact: Artifact,
    source: sources.RowSource,
    target_config: TargetConfig,
    aux_layers: tuple[int, ...],
    plan: Plan,
) -> None:
    """Write the manifest, if this process is the one that sees every shard whole."""
    from stages.dump.shards.metadata import write_metadata
    from stages.dump.shards.writer import read_sidecar, sidecar

    found = [read_sidecar(artifact.folder, shard) for shard in plan.shards]
    sidecars = [facts for facts in found if facts is not None]
    pairs = zip(plan.shards, found, strict=True)
    missing = [shard.index for shard, facts in pairs if facts is None]
    if lost := [index for index in missing if config.share.owns(index)]:
        raise RetryableError(
            f"{sidecar(artifact.folder, lost[0])}: expected a whole shard, as it was written; "
            "somebody removed or changed its files meanwhile. Run the same command again: it is "
            "captured anew."
        )
    if missing:
        waiting = len(missing)
        logger.info("this process's shards are whole; %d are left to the others", waiting)
        return
    with artifact.finishing() as mine:
        if not mine:
            return
        names = write_metadata(artifact.folder, config, target_config, aux_layers, plan, source)
        checksums = {
            name: entry["sha256"] for facts in sidecars for name, entry in facts["files"].items()
        }
        names += [sidecar(artifact.folder, shard.index).name for shard in plan.shards]
        asked = sum(facts["asked"] for facts in sidecars)
        gaps = [facts["logprob_gap"] for facts in sidecars if facts["logprob_gap"] is not None]
        artifact.finish(
            [*checksums, *names, plans.REJECTS],
            counts=plan.counts,
            facts={
                "tokens": plan.tokens,
                "aux_layers": list(aux_layers),
                "agreement": sum(f["hits"] for f in sidecars) / asked if asked else None,
                "logprob_gap": max(gaps, default=None),
                "target_hash": artifact.identity["input.target"],
                "greedy": source.is_greedy,
                "backend": plan.backend,
                "layout": config.layout,
            },
            checksums=checksums,
            engine=plan.backend,
        )
    _forget_plan(artifact.folder)


def _forget_plan(folder: Path) -> None:
    """What a finished artifact needs no more."""
    shutil.rmtree(folder / plans.FOLDER, ignore_errors=True)
