# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are states that others made."""

from pathlib import Path

from stages.dump.sources import state_files


def test_hidden_folders_and_files_are_no_data(tmp_path: Path) -> None:
    for name in ("b.pt", "sub/a.pt", ".ipynb_checkpoints/b-checkpoint.pt", "sub/.a.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert state_files(tmp_path) == [tmp_path / "b.pt", tmp_path / "sub" / "a.pt"]
