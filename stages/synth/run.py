# SPDX-License-Identifier: Apache-2.0
"""Prompts -> the target's answers -> Parquet.

In: prompts of any shape. Out: `part-*.parquet` with the server's own token ids. Cost: the target's
generation time; the client itself needs little. A killed run continues after its last whole part.
Several processes may share the work; the last one to finish writes the manifest.
"""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

from shared.artifacts.artifact import Artifact
from shared.conversations.reader import SKIPPED
from shared.conversations.switches import require_switches
from shared.errors import RetryableError
from shared.io import files
from shared.prompts.rows import Prompt
from shared.prompts.sources import usable
from shared.runtime.process import Share, stop_if_requested
from shared.runtime.status import Accounting, Status
from shared.runtime.wording import counted
from shared.target import model as target
from shared.target.templates import require_chat_template, template_inputs
from shared.target.tokenizer import tokenizer_hash, vocabulary_hash
from stages.synth import mixture, parts
from stages.synth.config import SynthConfig

logger = logging.getLogger(__name__)


def run(config: SynthConfig) -> None:
    """The stage, top to bottom.

    Raises:
        UserError: no prompts, no target, no chat template.
        OutputError: no row came out, or too many failed.
        RetryableError: the server died too often, or does not answer.
    """
    inputs = mixture.input_hashes(config)
    target_folder = target.locate(
        config.run.target, config.workspace, revision=config.run.target_revision
    )
    target.read_config(target_folder, trust_remote_code=config.run.trust_remote_code)
    if config.server_args.get("tokenizer-mode") != "mistral":  # which brings its own rendering
        require_chat_template(target_folder, config.run.chat_template, config.workspace)
        require_switches(target_folder, config.run, config.workspace)
    inputs |= template_inputs(target_folder, config.run, config.workspace)
    inputs["target"] = target.weights_hash(target_folder)
    inputs["tokenizer"] = tokenizer_hash(target_folder)
    artifact = Artifact(config.paths.stage("synth"), config, inputs=inputs)
    if artifact.is_done():
        return
    with artifact.work() as is_needed:
        if not is_needed:
            return
        rejects = artifact.folder / rejects_name(config.share)
        total = _survey(config, artifact.folder, rejects)
        accounting = asyncio.run(_answer(config, target_folder, artifact.folder, total))
        accounting.write_rejects(rejects)
        logger.info("%s", accounting.summary())
        if total or config.share.count == 1:  # a share may be empty, the whole may not
            accounting.check(
                max_failed_fraction=config.max_failed_fraction, label="synth", rejects=rejects
            )
        files.write_json(artifact.folder / _record(config.share), accounting.as_dict())
        _finish(config, artifact, target_folder)


def rejects_name(share: Share) -> str:
    """File of the rows that a share rejected."""
    return "rejects.jsonl" if share.count == 1 else f"rejects-{share.index:05d}.jsonl"


def _record(share: Share) -> str:
    """File that says what a finished share accounted for."""
    return f"share-{share.index:05d}-of-{share.count:05d}.json"


def _survey(config: SynthConfig, folder: Path, rejects: Path) -> int:
    """Read all input once before an engine starts; returns the number of rows.

    Raises:
        UserError: no row is usable, or too many are not.
    """
    accounting = Accounting()
    count = sum(1 for _ in usable(mixture.prompts(config), accounting))
    if count or accounting.rows_in or config.share.count == 1:
        accounting.write_rejects(rejects)
        accounting.check_input(
            usable=count,
            max_failed_fraction=config.max_failed_fraction,
            label=", ".join(source.path for source in config.all_sources),
            rejects=rejects,
        )
    return count + accounting.rows_in


async def _answer(config: SynthConfig, target_folder: Path, folder: Path, total: int) -> Accounting:
    # Here, not above: an artifact that is done already must not wait for these imports.
    from stages.synth.answers import answers

    accounting = Accounting()
    status = Status(config.paths.status(config.process_name))
    status.started()
    writer = parts.PartWriter(
        folder, config.share.index, max_rows=config.rows_per_part, max_age_s=config.seconds_per_part
    )
    done = parts.done_ids(folder)

    def unanswered() -> Iterator[Prompt]:
        for prompt in usable(mixture.prompts(config), accounting):
            if prompt.sample_id in done:
                accounting.ok += 1
            else:
                yield prompt

    async for outcome, in_flight in answers(config, target_folder, unanswered()):
        if outcome.refused is not None:
            reason = outcome.refused.reason
            account = accounting.skip if reason in SKIPPED else accounting.fail
            account(outcome.prompt.sample_id, reason, outcome.refused.detail)
        else:
            writer.add(outcome.rows)
            accounting.ok += 1
        status.progress(
            accounting.rows_in,
            total,
            "rows",
            answer_tokens_per_s=status.rate(writer.answer_tokens),
            in_flight=in_flight,
            failed=accounting.failed.total(),
        )
    writer.flush()
    stop_if_requested(f"saved: {counted(accounting.ok, 'answer')}")
    return accounting


def _finish(config: SynthConfig, artifact: Artifact, target_folder: Path) -> None:
    """Complete the artifact, if this was the last share of it."""
    from stages.synth.summary import print_summary

    shares = [Share(index, config.share.count) for index in range(config.share.count)]
    records = [artifact.folder / _record(share) for share in shares]
    if missing := [path.name for path in records if not path.exists()]:
        logger.info("this share is done; still to come: %s", ", ".join(missing))
        return
    with artifact.finishing() as mine:
        if not mine:
            return
        accounting = Accounting.sum_of(map(files.read_json, records))
        totals = parts.add_up(artifact.folder)
        if totals.conversations != accounting.ok:
            raise RetryableError(
                f"{artifact.folder}: expected the answers to {accounting.ok} prompts, found those to "
                f"{totals.conversations}: parts were removed or added meanwhile.",
                code="synth-parts-changed",
                remedy="Run the same command again for every shard: missing rows are answered again.",
                facts={"expected": accounting.ok, "found": totals.conversations},
            )
        rejects = [rejects_name(share) for share in shares]
        present = [name for name in rejects if (artifact.folder / name).exists()]
        print_summary(config, accounting, totals)
        artifact.finish(
            [*totals.names, *present, *(path.name for path in records)],
            counts=accounting.as_dict(),
            facts={
                **totals.facts(),
                "target_hash": artifact.identity["input.target"],
                "vocabulary_hash": vocabulary_hash(target_folder),
                # Another model's states cost acceptance: whoever reads this shall see it.
                "target_train": config.run.target_train,
                # A data set's own answers are nobody's argmax.
                "greedy": config.greedy and config.mode != "keep",
                "on_policy": config.mode != "keep",
            },
            engine="vllm" if config.mode != "keep" else "",
        )
