# SPDX-License-Identifier: Apache-2.0
"""Where the rows come from: synth's artifact of the same run."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared import conversations
from shared.conversations import Conversation
from shared.errors import UserError
from shared.manifest import require_parent
from shared.status import Accounting
from stages.dump.config import DumpConfig


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows with token ids and answer spans, and what the artifact must remember of them.

    Attributes:
        folder: where the rows lie.
        parents, inputs: as `Artifact` takes them.
        answered_by: hash of the target that gave the answers; None where that is not known.
        is_greedy: whether each answer token is the target's own argmax.
    """

    folder: Path
    parents: Mapping[str, Mapping[str, Any]]
    inputs: Mapping[str, str]
    answered_by: str | None
    is_greedy: bool

    def rows(self, accounting: Accounting) -> Iterator[Conversation]:
        """Every row, in an order that never changes; those that cannot be read are accounted for."""
        yield from conversations.read_conversations(self.folder)

    def require_target(self, target_folder: Path, target_hash: str) -> None:
        """Refuse a target other than the one that answered.

        Raises:
            UserError: its weights are others.
        """
        if self.answered_by not in (None, target_hash):
            raise UserError(
                f"{target_folder} is not the target that answered in {self.folder}: its weights "
                "changed since. Run synth again with --overwrite, or restore the target."
            )


def open_source(config: DumpConfig) -> Source:
    """The rows that the recipe names.

    Raises:
        UserError: there is no finished synth artifact.
    """
    folder = config.paths.stage("synth")
    parent = require_parent(folder, stage="synth", config=config)
    return Source(
        folder=folder,
        parents={"synth": parent},
        inputs={},
        answered_by=parent["facts"]["target_hash"],
        is_greedy=parent["identity"]["synth.temperature"] == 0,
    )
