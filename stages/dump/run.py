# SPDX-License-Identifier: Apache-2.0
"""Conversations -> the target's hidden states -> `.pt` shards.

In: synth's Parquet. Out: shards of [T, A+1, H] bfloat16 with ids and masks. Cost: one prefill of
every row, and T * (A+1) * H * 2 bytes of disk. Shards are planned from the rows alone, so a killed
run continues with the first shard that is not whole.
"""

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared import conversations, files, layers, target
from shared.errors import UserError
from shared.manifest import Artifact, require_parent
from shared.process import stop_if_requested
from shared.status import Accounting, Status
from shared.target import TargetConfig
from stages.dump.config import DumpConfig

logger = logging.getLogger(__name__)


def run(config: DumpConfig) -> None:
    """The stage, top to bottom.

    Raises:
        UserError: no finished synth artifact, a changed target, too little disk.
        OutputError: states that fail their checks, or no row left.
    """
    parent = require_parent(config.paths.stage("synth"), stage="synth", config=config)
    folder = target.locate(config.run.target, config.workspace, revision=config.run.target_revision)
    target_config = target.read_config(folder)
    aux_layers = layers.resolve_aux_layers(config.run.aux_layers, target_config.num_layers)
    target_hash = target.weights_hash(folder)
    if target_hash != parent["facts"]["target_hash"]:
        raise UserError(
            f"{folder} is not the target that answered in {config.paths.stage('synth')}: its "
            "weights changed since. Run synth again with --overwrite, or restore the target."
        )
    artifact = Artifact(
        config.paths.stage("dump"),
        config,
        parents={"synth": parent},
        inputs={"target": target_hash},
    )
    if artifact.is_done():
        return
    with artifact.work():
        accounting = Accounting()
        plans = list(plan_shards(config, target_config, len(aux_layers), accounting))
        rejects = artifact.folder / "rejects.jsonl"
        accounting.write_rejects(rejects)
        accounting.check(
            max_failed_fraction=config.max_failed_fraction, what="synth's rows", rejects=rejects
        )
        _require_disk(artifact.folder, plans, target_config, len(aux_layers))
        # Sampled answers are not the target's argmax, so their agreement is told and not asked for.
        greedy = parent["identity"]["synth.temperature"] == 0
        least = config.min_agreement if greedy else 0.0
        checksums, agreement = _capture(
            config, target_config, aux_layers, artifact.folder, plans, least
        )
        # Here, not above: an artifact that is done already must not wait for torch.
        from stages.dump.metadata import write_metadata

        names = write_metadata(artifact.folder, config, target_config, aux_layers, plans, parent)
        artifact.finish(
            [*checksums, *names, rejects.name],
            counts=accounting.as_dict(),
            facts={
                "tokens": sum(plan.num_tokens for plan in plans),
                "aux_layers": list(aux_layers),
                "agreement": agreement,
                "target_hash": target_hash,
                "greedy": greedy,
            },
            checksums=checksums,
            engine=config.engine,
        )


@dataclasses.dataclass
class ShardPlan:
    """The rows of one shard: known before anything is captured, the same in every run."""

    index: int
    sample_ids: list[str] = dataclasses.field(default_factory=list)
    input_ids: list[list[int]] = dataclasses.field(default_factory=list)
    loss_masks: list[list[int]] = dataclasses.field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.input_ids))


def plan_shards(
    config: DumpConfig, target_config: TargetConfig, num_aux: int, accounting: Accounting
) -> Iterator[ShardPlan]:
    """Rows in the order of synth's parts, cut into shards of about `shard_bytes`."""
    token_bytes = (num_aux + 1) * target_config.hidden_size * 2
    limit = config.run.max_length_tokens
    plan = ShardPlan(0)
    for row in conversations.read_conversations(config.paths.stage("synth")):
        ids, mask = list(row.input_ids), row.loss_mask()
        if len(ids) > limit and config.over_long == "skip":
            accounting.skip(row.sample_id, "too_long", f"{len(ids)} > {limit}")
            continue
        ids, mask = ids[:limit], mask[:limit]
        if not any(mask):
            accounting.skip(row.sample_id, "no_trained_token")
            continue
        if max(ids) >= target_config.vocab_size:
            accounting.fail(row.sample_id, "token_outside_vocabulary", str(max(ids)))
            continue
        accounting.ok += 1
        plan.sample_ids.append(row.sample_id)
        plan.input_ids.append(ids)
        plan.loss_masks.append(mask)
        if plan.num_tokens * token_bytes >= config.shard_bytes:
            yield plan
            plan = ShardPlan(plan.index + 1)
    if plan.sample_ids:
        yield plan


def _require_disk(
    folder: Path, plans: list[ShardPlan], target_config: TargetConfig, num_aux: int
) -> None:
    tokens = sum(plan.num_tokens for plan in plans)
    needed = tokens * (num_aux + 1) * target_config.hidden_size * 2
    held = sum(path.stat().st_size for path in folder.glob("shard_*.pt"))
    free = shutil.disk_usage(folder).free
    logger.info("%d tokens in %d shards: %.3f GB", tokens, len(plans), needed / 1e9)
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
    plans: list[ShardPlan],
    min_agreement: float,
) -> tuple[dict[str, str], float]:
    """Capture what is missing; returns (file -> SHA-256, share of answer tokens predicted)."""
    from stages.dump.capture import ShardWriter, open_engine

    writer = ShardWriter(folder, target_config, aux_layers, min_agreement=min_agreement)
    missing = [plan for plan in plans if not writer.is_written(plan)]
    if len(missing) < len(plans):
        logger.info("%d of %d shards are there already", len(plans) - len(missing), len(plans))
    status = Status(config.paths.status("dump"))
    status.started()
    if missing:
        total = sum(plan.num_tokens for plan in plans)
        with open_engine(config, target_config, aux_layers) as engine:
            for plan in missing:
                writer.write(plan, engine)
                stop_if_requested(f"shards up to {plan.index} are saved")
                status.progress(writer.tokens, total, "tokens", shard=plan.index)
    return writer.checksums, writer.agreement()


def sidecar(folder: Path, index: int) -> Path:
    """The small file beside a shard that says what it holds: a shard without it is not whole."""
    return folder / f"shard_{index:05d}.json"


def read_sidecar(folder: Path, index: int) -> dict[str, Any] | None:
    """What the sidecar says, or None where the shard is not whole."""
    path = sidecar(folder, index)
    return dict(files.read_json(path)) if path.exists() else None
