# SPDX-License-Identifier: Apache-2.0
"""adapt refuses what a later stage could not take before its first engine starts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.heads import write_random_head
from tests.models import tiny_llama
from tests.runs import ROOT


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapt")
    target = tiny_llama(folder / "tiny")
    write_random_head(folder / "head", target=target, draft_vocab_size=128)
    rows = [json.dumps({"prompt": f"question {n}"}) for n in range(60)]
    (folder / "traffic.jsonl").write_text("\n".join(rows))
    recipe: dict[str, dict[str, Any]] = {
        "run": {"name": "new", "target": "tiny", "max_length_tokens": 64},
        "dump": {"backend": "hf"},
        "bench": {"max_tokens": 16},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    recipe["bench"]["num_speculative_tokens"] = 1
    (folder / "one.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def adapt(
    workspace: Path, head: str, *more: str, recipe: str = "recipe.yaml"
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "stages.ops", "adapt", "--workspace", str(workspace)]
    command += ["--recipe", str(workspace / recipe), "--traffic", "traffic.jsonl"]
    return subprocess.run(
        [*command, "--head", head, *more], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_a_dry_run_shows_the_plan_and_writes_nothing(workspace: Path) -> None:
    before = sorted(workspace.rglob("*"))
    done = adapt(workspace, "head", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "new-before" in done.stdout
    assert "52 rows" in done.stdout  # eight are held out
    assert sorted(workspace.rglob("*")) == before


def test_a_recipe_that_drafts_one_token_is_taken(workspace: Path) -> None:
    done = adapt(workspace, "head", "--dry_run", recipe="one.yaml")
    assert done.returncode == 0, done.stderr


def test_a_head_that_train_cannot_start_from_is_refused(workspace: Path) -> None:
    write_random_head(workspace / "odd", target=workspace / "tiny", draft_vocab_size=128)
    path = workspace / "odd" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_bias": True}))
    done = adapt(workspace, "odd")
    assert done.returncode == 2
    assert "a kind of head that train does not make: {'attention_bias': True}" in done.stderr
    assert not (workspace / "new" / "recipe.yaml").exists()
    assert not (workspace / "new" / "synth").exists()
    assert not (workspace / "new-before" / "bench").exists()


def test_the_runs_own_head_is_refused(workspace: Path) -> None:
    write_random_head(workspace / "new" / "export", target=workspace / "tiny")
    done = adapt(workspace, "new/export")
    assert done.returncode == 2
    assert "adapt-own-head" in done.stderr
