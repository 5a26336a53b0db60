# SPDX-License-Identifier: Apache-2.0
"""The chain without an engine for a family's tiny target: kept answers, hf states, a head, its export.

In this process, since the imports would take longer than the stages.
"""

import json
from pathlib import Path

import yaml

from shared.settings import build
from stages.dump.config import DumpConfig
from stages.dump.run import run as dump
from stages.synth.config import SynthConfig
from stages.synth.run import run as synth
from stages.train.config import TrainConfig
from stages.train.run import run as train
from tests import targets
from tests.models import tiny_tokenizer

TARGET = "tiny"


def export(name: str, workspace: Path) -> Path:
    """Train a head for the family `name` for two steps; returns the folder of its export."""
    targets.make(name, workspace / TARGET)
    tiny_tokenizer(workspace / TARGET)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {n}"},
                {"role": "assistant", "content": f"{n} is what you said"},
            ]
        }
        for n in range(8)
    ]
    (workspace / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "run": {"target": TARGET, "max_length_tokens": 64, "draft_vocab_size": 64},
        "synth": {"mode": "keep", "prompts": "rows.jsonl"},
        "dump": {"backend": "hf"},
        "train": {"epochs": 1, "batch_tokens": 128, "intermediate_size": 96},
    }
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = {"recipe": str(workspace / "recipe.yaml"), "workspace": str(workspace)}
    synth(build(SynthConfig, flags))
    dump(build(DumpConfig, flags))
    train(build(TrainConfig, flags))
    return workspace / "run" / "export"
