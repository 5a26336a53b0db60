# SPDX-License-Identifier: Apache-2.0
"""What decides between the old head and the new one."""

import json
from pathlib import Path

import pytest

from shared.paths import RunPaths
from stages.ops.adapt.run import _compare


@pytest.mark.parametrize(("after", "improved"), [(2.05, True), (2.03, False), (1.9, False)])
def test_a_gain_of_less_than_was_asked_for_is_none(
    tmp_path: Path, after: float, improved: bool
) -> None:
    runs = {"old": 2.0, "new": after}
    for name, length in runs.items():
        head = {"acceptance_length": length, "acceptance_length_interval": [length, length]}
        path = RunPaths(tmp_path, name).report
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"head": {"acceptance": head, "tokens_per_s": 10 * length}}))
    found = _compare(RunPaths(tmp_path, "old"), RunPaths(tmp_path, "new"), 0.02)
    assert found["improved"] is improved
    assert (found["before"], found["after"]) == (2.0, after)
    assert found["after_tokens_per_s"] == 10 * after
