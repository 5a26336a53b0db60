# SPDX-License-Identifier: Apache-2.0
"""As tests/quick/test_stage_refusals.py, where a stage loads torch or transformers before it can tell."""

from pathlib import Path

import pytest

from tests.models import tiny_llama
from tests.quick.test_stage_refusals import refused, run, synth


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "tiny")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    return tmp_path


def test_conversations_that_cannot_be_read_have_the_same_code_in_dump(workspace: Path) -> None:
    (workspace / "rows.jsonl").write_text('{"messages": [\n{"messages": 3}\n')
    flags = ("--target", "tiny", "--conversations", "rows.jsonl", "--backend", "hf")
    refused(run(workspace, "dump", *flags), "none of 2 rows is usable")


def test_a_target_whose_config_lacks_its_layers(workspace: Path) -> None:
    (workspace / "tiny" / "config.json").write_text('{"hidden_size": 8}')
    refused(synth(workspace), "num_hidden_layers")


def test_a_train_before_its_dump(workspace: Path) -> None:
    refused(run(workspace, "train", "--target", "tiny"), "python -m stages.dump")
