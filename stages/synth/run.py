# SPDX-License-Identifier: Apache-2.0
"""Prompts -> the target's answers -> Parquet.

In: a JSON-lines file. Out: `part-*.parquet` with the server's own token ids. Cost: the target's
generation time; the client is idle beside it. A killed run continues after its last whole part.
"""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

from shared import conversations, files, target
from shared.conversations import Conversation
from shared.manifest import Artifact
from shared.paths import require_input
from shared.process import stop_if_requested
from shared.prompts import BadRow, Prompt
from shared.sources import read_prompts
from shared.status import Accounting, Status
from stages.synth.config import SynthConfig

logger = logging.getLogger(__name__)


def run(config: SynthConfig) -> None:
    """The stage, top to bottom.

    Raises:
        UserError: no prompts, no target, no chat template.
        OutputError: no row came out, or too many failed.
        RetryableError: the server died or does not answer.
    """
    prompts_path = require_input(config.prompts, config.workspace, what="synth.prompts")
    target_folder = target.locate(
        config.run.target, config.workspace, revision=config.run.target_revision
    )
    target.read_config(target_folder)
    target.require_chat_template(target_folder)
    inputs = {
        "prompts": files.sha256(prompts_path),
        "target": target.weights_hash(target_folder),
    }
    artifact = Artifact(config.paths.stage("synth"), config, inputs=inputs)
    if artifact.is_done():
        return
    with artifact.work():
        writer = PartWriter(artifact.folder, config.rows_per_part)
        accounting = Accounting()
        rejects = artifact.folder / "rejects.jsonl"
        waiting = list(_unanswered(prompts_path, writer.done_ids, accounting))
        accounting.write_rejects(rejects)
        accounting.check_input(
            usable=accounting.ok + len(waiting),
            max_failed_fraction=config.max_failed_fraction,
            what=str(prompts_path),
            rejects=rejects,
        )
        if waiting:
            asyncio.run(_answer(config, target_folder, waiting, writer, accounting))
        writer.flush()
        stop_if_requested(f"{accounting.ok} answers are saved")
        accounting.write_rejects(rejects)
        logger.info("%s", accounting.summary())
        accounting.check(
            max_failed_fraction=config.max_failed_fraction,
            what=str(prompts_path),
            rejects=rejects,
        )
        facts = writer.facts()
        artifact.finish(
            [*writer.names, rejects.name],
            counts=accounting.as_dict(),
            facts={**facts, "target_hash": inputs["target"]},
            engine="vllm",
        )


class PartWriter:
    """Collects answers into Parquet parts; what earlier runs wrote counts as done."""

    def __init__(self, folder: Path, rows_per_part: int) -> None:
        self.folder = folder
        self.rows_per_part = rows_per_part
        self.names = [path.name for path in sorted(folder.glob(conversations.PART_GLOB))]
        self.done_ids: set[str] = set()
        self._buffer: list[Conversation] = []
        self._prompt_tokens = 0
        self._answer_tokens = 0
        for row in conversations.read_conversations(folder):
            self._count(row)

    def _count(self, row: Conversation) -> None:
        self.done_ids.add(row.sample_id)
        self._prompt_tokens += row.num_prompt_tokens
        self._answer_tokens += row.num_completion_tokens

    @property
    def answer_tokens(self) -> int:
        return self._answer_tokens

    def add(self, row: Conversation) -> None:
        self._count(row)
        self._buffer.append(row)
        if len(self._buffer) >= self.rows_per_part:
            self.flush()

    def flush(self) -> None:
        """Write what is collected as one part."""
        if self._buffer:
            name = conversations.part_name(len(self.names))
            rows = sorted(self._buffer, key=lambda row: row.sample_id)
            conversations.write_part(self.folder / name, rows)
            self.names.append(name)
            self._buffer = []

    def facts(self) -> dict[str, int]:
        return {"prompt_tokens": self._prompt_tokens, "answer_tokens": self._answer_tokens}


def _unanswered(path: Path, done_ids: set[str], accounting: Accounting) -> Iterator[Prompt]:
    for row in read_prompts(path):
        if isinstance(row, BadRow):
            account = accounting.skip if row.reason == "duplicate_id" else accounting.fail
            account(row.row, row.reason, row.detail)
        elif row.sample_id in done_ids:
            accounting.ok += 1
        else:
            yield row


async def _answer(
    config: SynthConfig,
    target_folder: Path,
    waiting: list[Prompt],
    writer: PartWriter,
    accounting: Accounting,
) -> None:
    # Here, not above: an artifact that is done already must not wait for these imports.
    from stages.synth.client import Refused, answer_all
    from stages.synth.engine import serve

    total = len(waiting) + accounting.rows_in
    status = Status(config.paths.status("synth"))
    status.started()
    source = Path(config.prompts).name
    with serve(config, target_folder) as server:
        async for answer in answer_all(server, config, waiting, source):
            if isinstance(answer, Refused):
                account = accounting.skip if answer.reason == "too_long" else accounting.fail
                account(answer.prompt.sample_id, answer.reason, answer.detail)
            else:
                writer.add(answer)
                accounting.ok += 1
            status.progress(
                accounting.rows_in,
                total,
                "rows",
                failed=accounting.failed.total(),
                answer_tokens=writer.answer_tokens,
            )
        writer.flush()
