# SPDX-License-Identifier: Apache-2.0
"""When a stage says how long it will take."""

import json
from pathlib import Path

import pytest

from shared.runtime.status import Status


@pytest.mark.parametrize(
    ("done", "total", "in_flight", "is_told"),
    [
        (2, 1000, 32, False),  # two short answers, while thirty requests still run
        (20, 1000, 32, False),
        (40, 1000, 32, True),
        (12, 1000, 0, True),
        (2, 1000, 0, False),
        (2, 8, 0, True),
    ],
)
def test_the_time_left_is_told_after_the_first_wave(
    done: int, total: int, in_flight: int, is_told: bool, tmp_path: Path
) -> None:
    status = Status(tmp_path / "synth.json", period_s=0.0)
    status.progress(0, total, "rows", in_flight=in_flight)
    status.progress(done, total, "rows", in_flight=in_flight)
    progress = json.loads((tmp_path / "synth.json").read_text())["progress"]
    assert (progress["left_s"] is not None) == is_told


def test_the_last_progress_is_told_whenever_it_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A training's last walk, a second after the line before; told once, though it is asked again."""
    caplog.set_level("INFO")
    status = Status(tmp_path / "train.json", period_s=3600.0)
    status.started()
    status.progress(970, 974, "steps", walked_al="2.692")
    assert "progress" not in json.loads((tmp_path / "train.json").read_text())
    for _ in range(3):
        status.progress(974, 974, "steps", walked_al="2.726")
    assert caplog.text.count("steps=974/974") == 1
    progress = json.loads((tmp_path / "train.json").read_text())["progress"]
    assert (progress["done"], progress["walked_al"]) == (974, "2.726")
