# SPDX-License-Identifier: Apache-2.0
"""The run that an operator means by a name."""

from pathlib import Path

from shared.config import nearest
from shared.errors import UserError
from shared.paths import RunPaths


def find_run(name: str, workspace: Path) -> RunPaths:
    """The run that a name in the workspace, or a folder, means.

    Raises:
        UserError: there is none.
    """
    for folder in (workspace / name, Path(name)):
        if folder.is_dir():
            absolute = folder.absolute()
            return RunPaths(absolute.parent, absolute.name)
    runs = [path.parent.name for path in sorted(workspace.glob("*/recipe.yaml"))]
    hint = nearest(name, runs) if runs else "There is no run in this workspace."
    raise UserError(f"expected the folder of a run at {workspace / name}, found none. {hint}")
