# SPDX-License-Identifier: Apache-2.0
"""A run that was made stage by stage, with flags or without a recipe, has one recipe in the end."""

from pathlib import Path

import pytest
import yaml

from shared.artifacts.artifact import Artifact
from shared.config import StageConfig
from shared.recipe import read_recipe
from shared.settings import build
from stages.dump.config import DumpConfig
from stages.synth.config import SynthConfig

TEXT = "# mine\nrun: {name: r, target: t}\nsynth: {prompts: p.jsonl, max_tokens: 64}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


def work(kind: type[StageConfig], workspace: Path, **flags: str) -> Path:
    """Begin a stage's work; returns where the run's recipe is."""
    config = build(kind, {"workspace": str(workspace), **flags})
    with Artifact(config.paths.stage(config.section), config).work():
        return config.paths.recipe


def test_a_recipe_that_was_followed_is_kept_as_it_stands(tmp_path: Path, recipe: Path) -> None:
    kept = work(SynthConfig, tmp_path, recipe=str(recipe))
    assert kept == tmp_path / "r" / "recipe.yaml"
    assert kept.read_text() == TEXT


def test_flags_of_each_stage_are_recorded_and_stay(tmp_path: Path, recipe: Path) -> None:
    work(SynthConfig, tmp_path, recipe=str(recipe), max_tokens="32")
    kept = work(DumpConfig, tmp_path, recipe=str(recipe), batch_tokens="512")
    assert read_recipe(kept) == {
        "run": {"name": "r", "target": "t"},
        "synth": {"prompts": "p.jsonl", "max_tokens": 32},
        "dump": {"batch_tokens": 512},
    }


def test_without_a_recipe_the_flags_are_one(tmp_path: Path) -> None:
    kept = work(SynthConfig, tmp_path, target="t", name="r", prompts="p.jsonl", overwrite="true")
    assert yaml.safe_load(kept.read_text()) == {
        "run": {"target": "t", "name": "r"},
        "synth": {"prompts": "p.jsonl"},
    }


def test_the_runs_own_recipe_is_never_rewritten(tmp_path: Path) -> None:
    own = tmp_path / "r" / "recipe.yaml"
    own.parent.mkdir()
    own.write_text(TEXT)
    work(SynthConfig, tmp_path, recipe=str(own), max_tokens="32")
    assert own.read_text() == TEXT


def test_of_one_process_among_several_no_share_is_recorded(tmp_path: Path, recipe: Path) -> None:
    flags = {"num_shards": "2", "shard_index": "1", "concurrency": "7"}
    kept = work(SynthConfig, tmp_path, recipe=str(recipe), **flags)
    assert kept.read_text() == TEXT
