# SPDX-License-Identifier: Apache-2.0
"""Hidden states -> a draft head that vLLM serves.

In: dump's shards and three tensors of the target (embedding, final norm, lm_head). Out: `train/`
with the vocabulary, checkpoints and history, and `export/` with the head of the best walk. Cost:
see the README's floor. A killed run continues from its last checkpoint to the same weights.
"""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.artifacts.artifact import Artifact
from shared.artifacts.borrowed import borrow_dump
from shared.artifacts.checksums import require_unchanged
from shared.artifacts.manifest import MANIFEST, require_parent
from shared.config import RunConfig
from shared.contracts import hidden_states, layers
from shared.errors import RetryableError, UserError
from shared.io import files
from shared.paths import find_input
from shared.target import model as target
from shared.target.model import TargetConfig
from stages.train.commands import ExportConfig, VocabConfig
from stages.train.config import TrainConfig, num_ranks, rank
from stages.train.export import warm_start
from stages.train.export.again import forget_other_dtype
from stages.train.export.as_trained import as_trained, chat_settings, require_same
from stages.train.loop import budget
from stages.train.offer import require_dump

if TYPE_CHECKING:
    from stages.train.data.dataset import Dataset
    from stages.train.loop.trainer import Outcome


logger = logging.getLogger(__name__)


def run(config: TrainConfig) -> None:
    """The stage, top to bottom.

    Raises:
        UserError: no finished dump, a changed target, nothing to train on.
        OutputError: the loss is not finite, or the export fails its checks.
        RetryableError: another process finished this training while the ranks started.
    """
    parent, target_config = inputs(config)
    config = budget.resolved(config, parent, target_config.hidden_size)
    training = Artifact(
        config.paths.stage("train"),
        config,
        parents={"dump": parent},
        inputs=warm_start.fingerprint(config),
        mends=False,  # only its steps can make it
    )
    if not training.is_done():
        _train_and_record(config, parent, target_config, training)
    if rank() == 0:  # the ranks train together, rank 0 alone writes
        _export_best(config, parent, target_config, training.folder)


def _train_and_record(
    config: TrainConfig, parent: dict[str, Any], target_config: TargetConfig, training: Artifact
) -> None:
    from stages.train.loop.distributed import require_trackers

    require_trackers(config)  # before an older training is cleared
    is_main = rank() == 0
    with training.work() if is_main else contextlib.nullcontext(True) as is_needed:
        if not is_needed:
            if num_ranks() > 1:  # the other ranks wait for this one
                raise RetryableError(
                    f"another process finished {training.folder} while the ranks started.",
                    code="train-finished-elsewhere",
                    remedy="Run the same command again to export.",
                )
            return
        if is_main:
            files.unlink(config.paths.export, MANIFEST)  # its weights are not those to come
        outcome = _train(config, parent, target_config, training.folder)
        if is_main:
            counts = {"in": outcome.samples, "ok": outcome.samples, "skipped": {}, "failed": {}}
            names = ["d2t.npy", "t2d.npy", "history.jsonl", "checkpoints/best.pt"]
            training.finish(names, counts=counts, facts=outcome.facts())


def run_vocab(config: VocabConfig) -> None:
    """Make the draft vocabulary alone.

    Raises:
        UserError: no finished dump, or a different vocabulary exists.
    """
    _, target_config = inputs(config)
    from stages.train.objective import vocabulary

    counts = hidden_states.read_token_freq(config.paths.stage("dump"), target_config.vocab_size)
    folder = config.paths.stage("train")
    vocabulary.forget_unbound(folder)
    vocabulary.load_or_make(folder, counts, config.run.draft_vocab_size)


def run_export(config: ExportConfig) -> None:
    """Export a checkpoint to a folder that engines load, and to the hub with --push_to.

    Raises:
        UserError: no such checkpoint, other settings than those of its training, or the hub refuses.
        OutputError: the tensors are not those that engines load.
    """
    folder = config.paths.stage("train")
    named = {"best": folder / "checkpoints" / "best.pt", "latest": folder / "checkpoints/latest.pt"}
    path = named.get(config.checkpoint) or Path(config.checkpoint)
    config, trained = as_trained(config, path)
    parent, target_config = inputs(config)
    chat = {f"run.{name}": value for name, value in chat_settings(parent).items()}
    require_same(config, chat, config.paths.stage("dump"))
    from stages.train import head as heads
    from stages.train.export.hf import export_head, require_replaceable

    head, step = heads.of_checkpoint(config, target_config, folder, path)
    out = Path(config.output or config.paths.root / f"export-{config.format}").absolute()
    require_replaceable(out, config.paths.export)
    card = {"checkpoint": path.name, "step": step, "dump": parent["facts"], "settings": trained}
    options: dict[str, Any] = {
        "target": config.run.target,
        "target_folder": find_input(config.run.target, config.workspace),
        "provenance": card,
        "dtype": config.export_dtype,
        "num_draft_tokens": config.walk_tokens,
        "serving": _serving(config.run, parent),
    }
    if config.format == "speculators":
        options["target_architectures"] = target_config.whole.get("architectures") or []
    export_head(head, out, **options)
    logger.info("exported step %d to %s", step, out)
    if config.push_to is not None:
        from stages.train.export.hub import push

        push(out, config.push_to)


def _serving(run: RunConfig, dump: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM must be told beside the head, so that it renders chats as those of the dump were."""
    run = run.model_copy(update=chat_settings(dump))
    return {
        "revision": run.target_revision,
        "trust-remote-code": run.trust_remote_code or None,
        "chat-template": run.chat_template and Path(run.chat_template).name,
        "default-chat-template-kwargs": run.template_kwargs or None,
    }


def inputs(config: TrainConfig) -> tuple[dict[str, Any], TargetConfig]:
    """The dump's manifest and the config of the target that it was made from."""
    if config.dump_of is not None:
        borrow_dump(config.paths, config.dump_of)
    folder = config.paths.stage("dump")
    parent = require_dump(config)
    located = target.locate_trained(config.run, config.workspace)
    target_config = target.read_config(located, trust_remote_code=config.run.trust_remote_code)
    if target.weights_hash(located) != parent["facts"]["target_hash"]:
        raise UserError(
            f"{located}: expected the target whose states are in {folder}; its weights have changed.",
            code="target-changed",
            remedy="Run synth and dump again with --overwrite, or restore the target.",
            facts={"target": str(located)},
        )
    wanted = list(layers.resolve_aux_layers(config.run.aux_layers, target_config.num_layers))
    if wanted != parent["facts"]["aux_layers"]:
        raise UserError(
            f"{folder}: expected states of the aux layers {wanted}, found "
            f"{parent['facts']['aux_layers']}.",
            code="dump-aux-layers",
            remedy="Run dump again with --overwrite.",
            facts={"expected": wanted, "found": parent["facts"]["aux_layers"]},
        )
    return parent, target_config


def _train(
    config: TrainConfig, parent: dict[str, Any], target_config: TargetConfig, folder: Path
) -> "Outcome":
    # Imported here, so that a finished artifact does not wait for torch.
    import torch

    from shared.target.tensors import read_tensors
    from stages.train import head as heads
    from stages.train.kernels.fused import require_compiler
    from stages.train.loop.distributed import make_accelerator, stop_if_any_rank_is_to, together
    from stages.train.loop.trainer import Trainer
    from stages.train.objective import vocabulary

    accelerator = make_accelerator(config, folder)
    with together(accelerator):
        stop_if_any_rank_is_to(accelerator)
    require_compiler(accelerator.device)
    torch.manual_seed(config.run.seed)
    tensors = read_tensors(target_config)
    dataset = open_dataset(config, parent)
    # Rank 0 makes the vocabulary that the others read.
    with together(accelerator), accelerator.main_process_first():
        if accelerator.is_main_process:
            vocabulary.forget_unbound(folder)
        head = heads.build(config, target_config, tensors, folder)
    if not dataset.held_out:
        logger.warning(
            "no walked acceptance length: that needs greedy answers and held-out samples"
        )
    with together(accelerator):
        return Trainer(config, tensors, head, dataset, folder, accelerator).run()


def open_dataset(config: TrainConfig, parent: dict[str, Any]) -> "Dataset":
    """The samples of the dump whose manifest is `parent`; none is held out where answers were sampled.

    Raises:
        UserError: a file is damaged.
    """
    from stages.train.data.dataset import Dataset
    from stages.train.data.followed import FollowedShards

    dump = config.paths.stage("dump")
    states = [name for name in parent["files"] if _holds_states(name)]
    require_unchanged(dump, parent, sorted(parent["files"].keys() - states))
    data_config = hidden_states.read_data_config(dump)
    return Dataset(
        dump,
        data_config,
        states,
        holdout_fraction=config.holdout_fraction if parent["facts"]["greedy"] else 0.0,
        max_holdout_samples=config.max_holdout_samples,
        max_samples=config.max_samples,
        manifest=parent,
        followed=FollowedShards.of(config, parent, data_config),
    )


def _holds_states(name: str) -> bool:
    """Whether it is a file of states; those are checked against their checksums when first read."""
    return Path(name).name.startswith(("shard_", "data_")) and name.endswith(".pt")


def _export_best(
    config: TrainConfig, parent: dict[str, Any], target_config: TargetConfig, training: Path
) -> None:
    trained = require_parent(training, stage="train", config=config)
    export = Artifact(
        config.paths.export,
        config,
        parents={"train": trained},
        inputs={"export_dtype": config.export_dtype},
    )
    forget_other_dtype(export)
    if export.is_done():
        return
    require_unchanged(training, trained, trained["files"])
    with export.work() as is_needed:
        if is_needed:
            names = _export(config, parent, target_config, training, trained, export.folder)
            export.finish(names, counts=trained["counts"], facts=trained["facts"])


def _export(
    config: TrainConfig,
    parent: dict[str, Any],
    target_config: TargetConfig,
    train_folder: Path,
    trained: dict[str, Any],
    folder: Path,
) -> list[str]:
    from stages.train import head as heads
    from stages.train.export.hf import export_head

    best = train_folder / "checkpoints" / "best.pt"
    head, _ = heads.of_checkpoint(config, target_config, train_folder, best)
    card = {"train": trained["facts"], "dump": parent["facts"], "settings": trained["identity"]}
    export_head(
        head,
        folder / "head",
        target=config.run.target,
        target_folder=find_input(config.run.target, config.workspace),
        provenance=card,
        dtype=config.export_dtype,
        num_draft_tokens=config.walk_tokens,
        name=str(folder),
        serving=_serving(config.run, parent),
    )
    for path in (folder / "head").iterdir():
        path.replace(folder / path.name)
    (folder / "head").rmdir()
    return ["config.json", "model.safetensors", "README.md"]
