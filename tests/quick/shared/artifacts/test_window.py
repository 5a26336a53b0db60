# SPDX-License-Identifier: Apache-2.0
"""What dump and train tell each other, read while the other one writes it."""

from pathlib import Path
from typing import Any

import pytest

from shared.artifacts import window
from shared.io import files


def test_a_shard_that_becomes_whole_while_it_is_looked_for_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = files.read_json

    def late(path: Path) -> Any:
        try:
            return read(path)
        finally:
            path.write_text('{"files": {}}')

    monkeypatch.setattr(files, "read_json", late)
    assert window.whole_shard(tmp_path, 0) is None
    assert window.whole_shard(tmp_path, 0) == {}


def test_a_word_for_another_dump_is_none(tmp_path: Path) -> None:
    window.Reading("one", [0], [1, 2], 1).write(tmp_path)
    assert window.read_reading(tmp_path, "other", 3) is None
    found = window.read_reading(tmp_path, "one", 3)
    assert found is not None and (found.kept, found.order, found.next) == ([0], [1, 2], 1)
