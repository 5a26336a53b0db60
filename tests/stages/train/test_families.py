# SPDX-License-Identifier: Apache-2.0
"""The chain without an engine for families that differ: kept answers, hf states, a head, an export."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import targets
from tests.models import tiny_tokenizer
from tests.runs import ROOT

pytestmark = pytest.mark.soak

# LayerNorm with scaled logits; 1 + weight in a hybrid.
NAMES = ("cohere", "qwen3_next")


def stage(workspace: Path, name: str) -> None:
    command = [sys.executable, "-m", f"stages.{name}", "--recipe", str(workspace / "recipe.yaml")]
    command += ["--workspace", str(workspace)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_head_is_trained_and_exported(name: str, tmp_path: Path) -> None:
    targets.make(name, tmp_path / "tiny")
    tiny_tokenizer(tmp_path / "tiny", vocab_size=512)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {n}"},
                {"role": "assistant", "content": f"{n} is what you said"},
            ]
        }
        for n in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "run": {"target": "tiny", "max_length_tokens": 64, "draft_vocab_size": 64},
        "synth": {"mode": "keep", "prompts": "rows.jsonl"},
        "dump": {"backend": "hf"},
        "train": {"epochs": 1, "batch_tokens": 128, "intermediate_size": 96},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for each in ("synth", "dump", "train"):
        stage(tmp_path, each)
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
