# SPDX-License-Identifier: Apache-2.0
"""Where the rows come from: synth's artifact of the same run, finished conversations, or states.

Conversations that nobody regenerates get their token ids and answer spans from the target's own chat
template (`shared/target/templates.py`); a row for which the template cannot tell them is left out, with its
reason. The target did not say these answers, so they are no measure of its states. Hidden states
that were made elsewhere bring ids and masks along.
"""

import abc
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.artifacts.checksums import require_unchanged
from shared.artifacts.manifest import require_parent
from shared.contracts import conversations, layers
from shared.contracts.conversations import Conversation, spans_of
from shared.errors import UserError
from shared.paths import find_input
from shared.prompts import sources
from shared.prompts.rows import BadRow, Prompt, is_name
from shared.runtime.status import Accounting
from shared.target import model as target
from shared.target.special_tokens import REASON, Policy, SpecialTokens
from shared.target.templates import TemplateMismatch, tokenize_conversation
from shared.target.tokenizer import (
    load_tokenizer,
    require_chat_template,
    tokenizer_hash,
    vocabulary_hash,
)
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

    @abc.abstractmethod
    def require_target(self, target_folder: Path, target_hash: str) -> None:
        """Refuse a target that these rows are not for.

        Raises:
            UserError: another target gave the answers, or this one has no chat template.
        """

    def require_unchanged(self) -> None:
        """Refuse rows that are not those that their stage wrote; asked before they are read.

        Raises:
            UserError: with the file that is damaged.
        """
        return


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
                    f"answered in {self.folder}. It must be that target's original."
                )
            return
        if self.parents["synth"]["facts"]["target_hash"] != target_hash:
            raise UserError(
                f"{target_folder} is not the target that answered in {self.folder}: its weights "
                "changed since. Run synth again with --overwrite, or restore the target."
            )


@dataclasses.dataclass(frozen=True)
class PlainRows(RowSource):
    """Finished conversations as JSON lines, Parquet or a hub's data set."""

    source: sources.Source
    workspace: Path
    inputs: Mapping[str, str]
    trust_remote_code: bool
    special_token_text: Policy
    parents: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    is_greedy: bool = False

    def rows(self, target_folder: Path, accounting: Accounting) -> Iterator[Conversation]:
        tokenizer = load_tokenizer(target_folder, trust_remote_code=self.trust_remote_code)
        special = SpecialTokens(tokenizer) if self.special_token_text == "skip" else None
        read = sources.read_source(self.source, self.workspace, label=_WHAT)
        for prompt in sources.without_duplicates(read):
            if isinstance(prompt, BadRow):
                account = accounting.skip if prompt.is_skipped else accounting.fail
                account(prompt.row, prompt.reason, prompt.detail)
                continue
            if special and (token := special.first_in([prompt.conversation, prompt.tools])):
                accounting.skip(prompt.sample_id, REASON, token)
                continue
            try:
                yield tokenized(tokenizer, prompt)
            except TemplateMismatch as mismatch:
                accounting.skip(prompt.sample_id, "template_mismatch", str(mismatch)[:200])

    def require_target(self, target_folder: Path, target_hash: str) -> None:
        require_chat_template(target_folder)


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
            yield _row(sample_id, ids, spans_of(mask))

    def require_target(self, target_folder: Path, target_hash: str) -> None:
        """Nothing in the files names a target; their sizes and `parity` tell."""


def state_files(folder: Path) -> list[Path]:
    """Every `.pt` below `folder`, in an order that never changes."""
    return sorted(folder.rglob("*.pt"))


def tokenized(tokenizer: Any, prompt: Prompt) -> Conversation:
    """A finished conversation as a row.

    Where the template shows earlier answers otherwise than it showed them when they were the last
    (reasoning is dropped from them), only the last answer's tokens are what the target would say.

    Raises:
        TemplateMismatch: the template does not tell which tokens are the answers.
    """
    messages, tools = prompt.conversation, prompt.tools or None
    try:
        ids, spans = tokenize_conversation(tokenizer, messages, tools)
    except TemplateMismatch:
        ids, spans = tokenize_conversation(tokenizer, messages, tools, last_only=True)
    return _row(prompt.sample_id, ids, spans, source=prompt.source, category=prompt.category)


def _row(
    sample_id: str,
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    *,
    source: str = "",
    category: str = "",
) -> Conversation:
    answered = sum(end - start for start, end in spans)
    return Conversation(
        sample_id=sample_id,
        conversation_id=sample_id,
        source=source,
        category=category,
        messages=(),
        input_ids=tuple(ids),
        loss_spans=tuple(spans),
        finish_reason="",
        num_prompt_tokens=len(ids) - answered,
        num_completion_tokens=answered,
    )


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
            {"conversations": digest, "tokenizer": tokenizer_hash(target_folder)},
            trust_remote_code=config.run.trust_remote_code,
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
            f"{Path(states).absolute()}, found {'none in ' + str(folder) if folder else 'neither'}."
        )
    # Names and sizes: reading terabytes for a fingerprint would cost more than the copy.
    listing = "".join(f"{p.relative_to(folder)} {p.lstat().st_size}\n" for p in paths)
    digest = hashlib.sha256(os.fsencode(listing)).hexdigest()
    return StateRows(folder, config.run.aux_layers, {"states": digest})
