# SPDX-License-Identifier: Apache-2.0
"""What train says of its head before the chain begins: it is asked as a process of its own."""

from pathlib import Path

import pytest

from shared.errors import UserError
from stages.ops.chain.run import run
from tests.quick.ops.chain.recipes import config, make_workspace, write


def test_a_head_that_is_refused_in_a_dry_run_leaves_no_log(tmp_path: Path) -> None:
    """`ops triage` would take it for the training's."""
    workspace = make_workspace(tmp_path)
    write(workspace, {"train": {"init_from": "nope"}})
    before = sorted(workspace.rglob("*"))
    with pytest.raises(UserError, match=r"train.init_from: expected a draft head's folder"):
        run(config(workspace, dry_run="true", only="train"))
    assert sorted(workspace.rglob("*")) == before
