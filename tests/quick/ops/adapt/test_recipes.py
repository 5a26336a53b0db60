# SPDX-License-Identifier: Apache-2.0
"""adapt writes over nothing that is not its own, and takes no recipe that compares something else."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.contracts.head_folder import read_head
from shared.errors import UserError
from shared.paths import RunPaths
from stages.ops.adapt import recipes
from stages.ops.adapt.run import run
from stages.ops.adapt.traffic import Split
from tests.quick.ops.adapt.conftest import RECIPE, asked, write_recipe


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("given", "theirs"),
    [
        ("new/recipe.yaml", "new/recipe.yaml"),
        ("recipe.yaml", "new/recipe.yaml"),
        ("recipe.yaml", "new-before/recipe.yaml"),
    ],
)
def test_a_recipe_that_adapt_has_not_written_stays(
    workspace: Path, given: str, theirs: str, dry_run: bool
) -> None:
    write_recipe(workspace, {"bench": {"min_acceptance_length": 2.5}}, given)
    path = write_recipe(workspace, {"bench": {"min_acceptance_length": 2.5}}, theirs)
    before = {each: each.read_bytes() for each in workspace.rglob("*") if each.is_file()}
    with pytest.raises(UserError, match="which it has not written") as refused:
        run(asked(workspace, recipe=workspace / given, dry_run=dry_run, overwrite=True))
    assert refused.value.code == "adapt-run-taken"
    assert refused.value.facts["found"] == str(path)
    assert {each: each.read_bytes() for each in workspace.rglob("*") if each.is_file()} == before


def test_adapts_own_recipe_is_no_users_recipe(workspace: Path) -> None:
    path = workspace / "new" / "recipe.yaml"
    recipes.write(path, {"run": {"name": "new", "target": "tiny"}})
    with pytest.raises(UserError, match=r"another run\.name, and keep it outside"):
        run(asked(workspace, recipe=path))


def test_rows_of_somebody_else_stay(workspace: Path) -> None:
    rows = workspace / "new" / "traffic" / "train.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("mine")
    with pytest.raises(UserError, match="which it has not written"):
        run(asked(workspace, overwrite=True))
    assert rows.read_text() == "mine"


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("synth", "sources", [{"path": "rows.jsonl"}]),
        ("dump", "conversations", "rows.jsonl"),
        ("dump", "states", "states"),
        ("train", "dump_of", "other"),
        ("train", "init_from", "head"),
        ("bench", "head", "head"),
        ("bench", "head_revision", "main"),
        ("bench", "endpoint", "http://127.0.0.1:9"),
        ("bench", "baseline_endpoint", "http://127.0.0.1:9"),
        ("bench", "earlier_report", "report.json"),
    ],
)
def test_other_rows_or_another_head_are_refused_by_name(
    workspace: Path, section: str, name: str, value: Any
) -> None:
    write_recipe(workspace, {section: {name: value}})
    with pytest.raises(UserError, match=f"expected no {section}.{name}: ") as refused:
        run(asked(workspace, dry_run=True))
    assert refused.value.code == "adapt-recipe"
    assert not (workspace / "new").exists()


@pytest.mark.parametrize(
    "options",
    [{"speculative_args": {"model": "third"}}, {"engine_args": {"spec_model": "third"}}],
)
def test_a_third_head_in_place_of_both_is_refused(workspace: Path, options: dict[str, Any]) -> None:
    write_recipe(workspace, {"bench": options})
    with pytest.raises(UserError, match=r"bench\..*_args: expected no option .* bench\.head"):
        run(asked(workspace, dry_run=True))
    assert not (workspace / "new").exists()


def test_what_the_two_recipes_say(workspace: Path) -> None:
    head = read_head(workspace / "head")
    after, before = RunPaths(workspace, "new"), RunPaths(workspace, "new-before")
    rows = Split(recipes.rows_folder(after), {})
    made: Any = recipes.recipe_after(RECIPE, after, head, rows)
    assert made["run"]["draft_vocab_size"] == 128
    assert made["train"] == {"init_vocabulary": "redraw", "init_from": "head"}
    assert made["synth"]["prompts"] == "new/traffic/train.jsonl"
    assert made["bench"]["min_acceptance_length"] == 0
    measured: Any = recipes.recipe_before(RECIPE, before, head, rows)
    assert measured["run"]["name"] == "new-before"
    assert measured["bench"]["head"] == "head"
    assert measured["bench"]["prompts"] == made["bench"]["prompts"] == "new/traffic/held_out.jsonl"
    recipes.write(after.recipe, made)
    assert yaml.safe_load(after.recipe.read_text()) == made
    recipes.require_own(workspace / "recipe.yaml", before, after)
