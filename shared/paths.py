# SPDX-License-Identifier: Apache-2.0
"""Where everything lies: the only file that joins paths inside the workspace.

<workspace>/<run>/recipe.yaml
<workspace>/<run>/{synth,dump,train,export,bench}/   one folder an artifact, manifest.json last
<workspace>/<run>/logs/<stage>.log
<workspace>/<run>/status/<stage>.json
"""

import contextlib
import dataclasses
import re
from pathlib import Path

from shared.errors import UserError

STAGES = ("synth", "dump", "train", "bench")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class RunPaths:
    """The folders and files of one run."""

    workspace: Path
    run_name: str

    @property
    def root(self) -> Path:
        return self.workspace / self.run_name

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def report(self) -> Path:
        return self.stage("bench") / "report.json"

    def stage(self, stage: str) -> Path:
        return self.root / stage

    def log(self, stage: str) -> Path:
        return self.root / "logs" / f"{stage}.log"

    def status(self, stage: str) -> Path:
        return self.root / "status" / f"{stage}.json"


def is_hub_id(value: str) -> bool:
    """Whether a value has the form of a hub's organisation/name; a path may have it too."""
    return _HUB_ID.fullmatch(value) is not None


def find_input(value: str, workspace: Path) -> Path | None:
    """The existing path that a recipe's `value` means, or None.

    A relative path is looked for in the workspace first, so that one recipe serves a container
    (workspace at /workspace) and a checkout alike, and then in the current folder.
    """
    for candidate in (workspace / value, Path(value)):
        with contextlib.suppress(OSError):  # a name longer than any file's
            if candidate.exists():
                return candidate.absolute()
    return None


def places(value: str, workspace: Path) -> str:
    """Where `find_input` looks, for a message."""
    looked_at = (workspace / value, Path(value).absolute())
    return " or ".join(dict.fromkeys(map(str, looked_at)))


def require_input(value: str, workspace: Path, *, label: str) -> Path:
    """As `find_input`, for what must exist.

    Raises:
        UserError: nothing is there; the message names the places looked at.
    """
    found = find_input(value, workspace)
    if found is None:
        raise UserError(
            f"{label}: expected a file or folder at {places(value, workspace)}, found none.",
            code="input-missing",
            remedy="Correct the path. Relative paths are taken from the workspace, then from the "
            "current folder.",
            facts={"setting": label, "value": value},
        )
    return found
