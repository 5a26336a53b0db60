# SPDX-License-Identifier: Apache-2.0
"""A workspace that docker made for a mistyped path: empty, and root's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
NOBODY = 65534
# Imported first: nobody may be unable to read the interpreter's own folder.
AS_NOBODY = f"""
import os, pathlib, sys
from shared.errors import UserError
from shared.io.files import check_workspace
os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
try:
    check_workspace(pathlib.Path(sys.argv[1]))
except UserError as error:
    sys.exit(str(error))
"""


def check(workspace: Path) -> str:
    for folder in (workspace, *workspace.parents):
        if folder.stat().st_uid == 0 and folder.is_relative_to("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    command = [sys.executable, "-c", AS_NOBODY, str(workspace)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_an_empty_workspace_of_roots_is_refused_by_name(tmp_path: Path) -> None:
    complaint = check(tmp_path)
    assert "EYRIE_WORKSPACE" in complaint
    assert f"user {NOBODY}, group {NOBODY}" in complaint
    tmp_path.joinpath("demo").mkdir()
    assert check(tmp_path) == ""  # a finished run can be read from a read-only volume
