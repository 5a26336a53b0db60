# SPDX-License-Identifier: Apache-2.0
"""Where a fetched target came from: `target.json`, which lies beside its weights."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UserError
from shared.io.files import read_json
from shared.paths import is_hub_id

FACTS = "target.json"


@dataclass(frozen=True)
class Origin:
    """The content of target.json: a hub id with its revision, or a package with its hash.

    Attributes:
        asked: the branch, tag or beginning of a commit that was asked for; None where none was.
    """

    source: str
    revision: str
    asked: str | None = None

    @property
    def is_on_hub(self) -> bool:
        return is_hub_id(self.source)


def read_origin(folder: Path) -> Origin | None:
    """What target.json says; None where there is none, or one that says something else."""
    with contextlib.suppress(UserError, TypeError):
        found = Origin(**read_json(folder / FACTS))
        return found if isinstance(found.source, str) and isinstance(found.revision, str) else None
    return None
