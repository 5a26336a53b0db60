# SPDX-License-Identifier: Apache-2.0
"""What a waiting person reads while engines answer."""

import json
from pathlib import Path

import pytest

from shared.vllm.measured_rows import Conversation
from stages.bench.measure import progress
from stages.bench.measure.loads import loads_of
from stages.bench.measure.plans import Plan
from stages.bench.measure.progress import Progress
from tests.quick.bench.report.reports import config


def test_every_engine_and_every_answer_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two prompts at two loads on two engines; nothing is due but the beginnings and the end."""
    caplog.set_level("INFO")
    settings = config(concurrency="[1,8]")
    asked = [Conversation(name, "", ()) for name in "ab"]
    told = Progress(tmp_path / "bench.json", Plan(settings, asked, loads_of(settings)), 2)
    for engine in ("head", "baseline"):
        told.begins(engine)
        for _ in range(4):
            told.answered()
    lines = [record.message.partition(" left_s")[0] for record in caplog.records]
    assert lines == [
        "prompts=0/8 measuring=head loads=2",
        "prompts=4/8 measuring=baseline loads=2",
        "prompts=8/8 measuring=baseline loads=2",
    ]
    assert json.loads((tmp_path / "bench.json").read_text())["progress"]["total"] == 8
    monkeypatch.setattr(progress, "PERIOD_S", 0.0)
    often = Progress(tmp_path / "bench.json", Plan(settings, asked, loads_of(settings)), 2)
    often.begins("head")
    often.answered()
    assert caplog.records[-1].message.startswith("prompts=1/8 measuring=head")
