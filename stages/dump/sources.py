# SPDX-License-Identifier: Apache-2.0
"""Where the rows come from: synth's artifact of the same run, finished conversations, or states.

Conversations that nobody regenerates get their token ids and answer spans from the target's own chat
template (`shared/conversations`); a row for which the template cannot tell them is left out, with its
reason. The target did not say these answers, so they are no measure of its states. Hidden states
that were made elsewhere bring ids and masks along.
"""

import abc
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.artifacts.checksums import require_unchanged
from shared.artifacts.manifest import require_parent
from shared.config import RunConfig
from shared.contracts import conversations, layers
from shared.contracts.conversations import Conversation, spans_of
from shared.errors import UserError
from shared.paths import find_input
from shared.prompts import sources
from shared.prompts.rows import is_name
from shared.runtime.status import Accounting
from shared.target import model as target
from shared.target.special_tokens import Policy
from shared.target.templates import require_chat_template, template_inputs
from shared.target.tokenizer import load_chat_tokenizer, tokenizer_hash, vocabulary_hash
from stages.dump.config import DumpConfig

_WHAT = "dump.conversations"


class RowSource(abc.ABC):
    """Rows with token ids and answer spans, and what the artifact must remember of them.

    Attributes:
        parents, inputs: as `Artifact` takes them.
        is_greedy: whether each answer token is the target's own argmax.
    """

    parents: Mapping[str, Mapping[str, Any]]
    inputs: Mapping[str, str]
    is_greedy: bool

    @abc.abstractmethod
    def rows(self, target_folder: Path, accounting: Accounting) -> Iterator[Conversation]:
        """Every row, in an order that never changes; those that cannot be read are accounted for."""

    def require_target(self, target_folder: Path, target_hash: str) -> None:  # noqa: B027
        """Refuse a target that these rows are not for.

        Raises:
            UserError: another target gave the answers, or this one has no chat template.
        """

    def require_unchanged(self) -> None:  # noqa: B027
        """Refuse rows that are not those that their stage wrote; asked before they are read.

        Raises:
            UserError: with the file that is damaged.
        """


@dataclasses.dataclass(frozen=True)
class SynthRows(RowSource):
    """The rows of a finished synth artifact: ids and spans are the server's own."""

    folder: Path
    parents: Mapping[str, Mapping[str, Any]]
    inputs: Mapping[str, str]
    is_greedy: bool
    of_another_target: bool = False  # a quantised copy answered: run.target_train

    def rows(self, target_folder: Path, accounting: Accounting) -> Iterator[Conversation]:
        yield from conversations.read_conversations(self.folder)

    def require_unchanged(self) -> None:
        parent = self.parents["synth"]
        require_unchanged(self.folder, parent, parent["files"])

    def require_target(self, target_folder: Path, target_hash: str) -> None:
        if self.of_another_target:
            if self.parents["synth"]["facts"]["vocabulary_hash"] != vocabulary_hash(target_folder):
                raise UserError(
                    f"run.target_train: {target_folder} has other token ids than the target that "
                    f"answered in {self.folder}.",
                    code="target-train-vocabulary",
                    remedy="Set it to the original of run.target, which has the same tokenizer.",
                    facts={"target_train": str(target_folder)},
                )
            return
        if self.parents["synth"]["facts"]["target_hash"] != target_hash:
            raise UserError(
                f"{target_folder} is not the target that answered in {self.folder}: its weights "
                "changed since.",
                code="target-changed",
                remedy="Run synth again with --overwrite, or restore the target.",
                facts={"target": str(target_folder), "synth": str(self.folder)},
            )


@dataclasses.dataclass(frozen=True)
class PlainRows(RowSource):
    """Finished conversations as JSON lines, Parquet or a hub's data set."""

    source: sources.Source
    workspace: Path
    inputs: Mapping[str, str]
    run: RunConfig
    special_token_text: Policy
    parents: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    is_greedy: bool = False

    def rows(self, target_folder: Path, accounting: Accounting) -> Iterator[Conversation]:
        # Here, not above: an artifact that is done already must not wait for a tokenizer.
        from shared.conversations.reader import ConversationReader, Refused

        tokenizer = load_chat_tokenizer(target_folder, self.run, self.workspace)
        reader = ConversationReader(tokenizer, self.run, self.special_token_text)
        read = sources.read_source(self.source, self.workspace, label=_WHAT)
        for prompt in sources.usable(sources.without_duplicates(read), accounting):
            try:
                yield from reader.rows(prompt)
            except Refused as refused:
                accounting.skip(prompt.sample_id, refused.reason, refused.detail)

    def require_target(self, target_folder: Path, target_hash: str) -> None:
        # Here, not above: other sources need no template.
        from shared.conversations.switches import require_switches

        require_chat_template(target_folder, self.run.chat_template, self.workspace)
        require_switches(target_folder, self.run, self.workspace)


@dataclasses.dataclass(frozen=True)
class StateRows(RowSource):
    """Hidden states that were made elsewhere, a file a conversation (`shared/contracts/row_files.py`)."""

    folder: Path
    aux_layers: tuple[int, ...] | None
    inputs: Mapping[str, str]
    parents: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    is_greedy: bool = False

    def rows(self, target_folder: Path, accounting: Accounting) -> Iterator[Conversation]:
        # Here, not above: an artifact that is done already must not wait for torch.
        from shared.contracts.row_files import RowFile

        config = target.read_config(target_folder)
        num_states = len(layers.resolve_aux_layers(self.aux_layers, config.num_layers)) + 1
        for path in state_files(self.folder):
            sample_id = path.relative_to(self.folder).with_suffix("").as_posix()
            if not is_name(sample_id):
                accounting.fail(
                    sample_id[:200], "bad_id", "the file's name is too long or unprintable"
                )
                continue
            file = RowFile(path, num_states, config.hidden_size)
            try:
                ids, mask = file.input_ids.tolist(), file.loss_mask.tolist()
            except UserError as error:
                accounting.fail(sample_id, "unreadable", str(error))
                continue
            answered = sum(mask)
            yield Conversation(
                sample_id=sample_id,
                conversation_id=sample_id,
                source="",
                category="",
                messages=(),
                input_ids=tuple(ids),
                loss_spans=spans_of(mask),
                finish_reason="",
                num_prompt_tokens=len(ids) - answered,
                num_completion_tokens=answered,
            )


def state_files(folder: Path) -> list[Path]:
    """Every `.pt` below `folder`, in an order that never changes; hidden folders are no data."""
    found = sorted(folder.rglob("*.pt"))
    return [
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def open_source(config: DumpConfig) -> RowSource:
    """The rows that the recipe names.

    Raises:
        UserError: there is no finished synth artifact, or nothing at `conversations` or `states`.
    """
    if config.states is not None:
        return _open_states(config, config.states)
    if config.conversations is not None:
        source = sources.Source(path=config.conversations)
        digest = sources.digest(source, config.workspace, label=_WHAT)
        target_folder = target.locate_trained(config.run, config.workspace)
        return PlainRows(
            source,
            config.workspace,
            {
                "conversations": digest,
                "tokenizer": tokenizer_hash(target_folder),
                **template_inputs(target_folder, config.run, config.workspace),
            },
            run=config.run,
            special_token_text=config.special_token_text,
        )
    folder = config.paths.stage("synth")
    parent = require_parent(folder, stage="synth", config=config)
    return SynthRows(
        folder=folder,
        parents={"synth": parent},
        inputs={},
        # What a quantised copy said need not be its original's argmax, nor what a data set holds.
        is_greedy=parent["facts"]["greedy"]
        and parent["facts"].get("on_policy", True)
        and config.run.target_train is None,
        of_another_target=config.run.target_train is not None,
    )


def _open_states(config: DumpConfig, states: str) -> StateRows:
    folder = find_input(states, config.workspace)
    paths = state_files(folder) if folder is not None and folder.is_dir() else []
    if folder is None or not paths:
        raise UserError(
            f"dump.states: expected a folder with .pt files at {config.workspace / states} or "
            f"{Path(states).absolute()}, found {'none in ' + str(folder) if folder else 'neither'}.",
            code="no-states",
            remedy="Set dump.states to the folder that holds them.",
            facts={"states": states},
        )
    # Names and sizes: reading terabytes for a fingerprint would cost more than the copy.
    listing = "".join(f"{p.relative_to(folder)} {p.lstat().st_size}\n" for p in paths)
    digest = hashlib.sha256(os.fsencode(listing)).hexdigest()
    return StateRows(folder, config.run.aux_layers, {"states": digest})
