# SPDX-License-Identifier: Apache-2.0
"""How many requests synth keeps in flight."""

import os
from pathlib import Path

import pytest

from shared.config import build
from shared.errors import UserError
from stages.synth.answers import in_flight
from stages.synth.config import SynthConfig


def config(**flags: str) -> SynthConfig:
    return build(SynthConfig, {"target": "model", "prompts": "p.jsonl", **flags})


@pytest.mark.parametrize(
    ("answer", "visible", "expected"),
    [
        ("H200, 143771\\nH200, 143771\\n", None, 512),
        ("H100, 81559\\n", None, 512),
        ("A100, 40960\\n", None, 256),
        ("H100, 81559\\nL4, 23034\\n", None, 64),  # the smaller one holds its part of every row
        ("H100, 81559\\nL4, 23034\\n", "0", 512),
        ("GB10, [N/A]\\n", None, 64),
        ("H100, 81559\\n", "", 64),
        ("", None, 64),
    ],
)
def test_the_smallest_gpu_that_may_be_used_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, visible: str | None, expected: int
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert in_flight(config()) == expected
    assert in_flight(config(concurrency="7")) == 7
    assert in_flight(config(endpoints="[http://a:1,http://b:1,http://c:1]")) == 192


@pytest.mark.parametrize("wrong", ["0", "many", "2.5"])
def test_what_is_no_number_of_requests_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="concurrency"):
        config(concurrency=wrong)
