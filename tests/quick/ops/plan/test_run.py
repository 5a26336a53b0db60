# SPDX-License-Identifier: Apache-2.0
"""plan as a command: where it finds a model, what it shows and writes."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from shared.errors import UserError
from shared.settings import build
from shared.target.model import locate
from stages.ops.config import PlanConfig
from stages.ops.plan.run import read_model, run
from stages.synth.config import SynthConfig
from tests.quick.ops.plan.well_known import CONFIGS, plan_of


def test_a_model_is_a_folder_a_file_or_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert read_model("m", tmp_path)[0] == tmp_path / "m" / "config.json"
    assert read_model("m/config.json", tmp_path)[0] == tmp_path / "m" / "config.json"
    with pytest.raises(UserError, match="found neither"):
        read_model("n", tmp_path)


def test_the_command_shows_everything_and_writes_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"model": str(CONFIGS / "gpt-oss-20b.json"), "out": str(tmp_path / "r.yaml")}
    flags |= {"gpu": "H200", "target": "openai/gpt-oss-20b"}
    run(build(PlanConfig, flags))
    shown = capsys.readouterr().out
    for part in (
        "20,914,757,184",
        "TIKTOKEN_RS_CACHE_DIR",
        "SpecForge",
        "GB200",
        "2.4 TB",
        "expected: 50,000 rows",
    ):
        assert part in shown
    planned = yaml.safe_load((tmp_path / "r.yaml").read_text())
    assert planned["train"]["intermediate_size"] == 11520
    assert planned["bench"]["min_acceptance_length"] == 1.7
    run(build(PlanConfig, {**flags, "json": "true"}))
    shown = capsys.readouterr().out
    assert json.loads(shown)["weight_bytes"] == plan_of("gpt-oss-20b").weights.bytes


def test_an_unknown_gpu_type_is_refused_whether_or_not_a_recipe_is_written() -> None:
    with pytest.raises(UserError, match=r"GPU types are H100, .*found 'H1'"):
        build(PlanConfig, {"model": "m", "gpu": "H1"})


def planned(model: str, **flags: str) -> SynthConfig:
    """The recipe that `plan MODEL --out r.yaml` writes, as `run` reads it."""
    run(build(PlanConfig, {"model": model, "json": "true", "out": "r.yaml", **flags}))
    return build(
        SynthConfig, {"recipe": "r.yaml", "workspace": flags.get("workspace", "workspace")}
    )


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is a model's."""
    folder = tmp_path / "My-Model"
    folder.mkdir()
    shutil.copyfile(CONFIGS / "llama-3.2-1b-instruct.json", folder / "config.json")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "given",
    [".", "./", "config.json", "../My-Model", "../My-Model/", "../My-Model/config.json", "sub/.."],
)
def test_the_target_of_a_recipe_is_the_models_folder(given: str, model: Path) -> None:
    (model / "sub").mkdir()
    recipe = planned(given)
    assert recipe.run.name == "my-model"
    found = locate(recipe.run.target, recipe.workspace, revision=None)
    assert found.samefile(model)
    assert not recipe.run.target.endswith((".", "/"))


def test_a_folder_of_the_workspace_is_named_as_it_was_given(model: Path) -> None:
    shutil.copytree(model, model.parent / "w" / "models" / "toy")
    for given in ("models/toy", "models/toy/config.json"):
        recipe = planned(given, workspace="../w", overwrite="true")
        assert recipe.run.target == "models/toy"


def test_a_config_alone_is_no_recipes_target(model: Path) -> None:
    shutil.copyfile("config.json", "Toy.json")
    for flag in ("out", "overlay"):
        flags = {"model": "Toy.json", "json": "true", flag: "made"}
        with pytest.raises(UserError, match="found a file alone") as refused:
            run(build(PlanConfig, flags))
        assert "--target" in refused.value.remedy
    assert sorted(path.name for path in model.iterdir()) == ["Toy.json", "config.json"]
    run(build(PlanConfig, {"model": "Toy.json", "json": "true"}))
    recipe = planned("Toy.json", target="org/toy")
    assert (recipe.run.name, recipe.run.target) == ("toy", "org/toy")


@pytest.mark.parametrize("flag", ["out", "overlay"])
@pytest.mark.parametrize("name", ["a/b", "..", "a\nb", "x" * 300])
def test_a_recipe_that_run_would_refuse_is_not_written(flag: str, name: str, model: Path) -> None:
    flags = {"model": ".", "json": "true", "name": name, flag: "made"}
    with pytest.raises(UserError, match=r"run\.name"):
        run(build(PlanConfig, flags))
    assert [path.name for path in model.iterdir()] == ["config.json"]


def test_another_recipe_or_overlay_is_not_replaced_unasked(model: Path) -> None:
    flags = {"model": ".", "json": "true", "out": "r.yaml", "overlay": "o"}
    run(build(PlanConfig, flags))
    made = [model / "r.yaml", *(model / "o").iterdir()]
    assert len(made) == 4
    before = {path: path.read_bytes() for path in made}
    run(build(PlanConfig, flags))  # the same plan again
    for path in made:
        path.write_text("# mine\n")
        with pytest.raises(UserError, match="found another") as refused:
            run(build(PlanConfig, flags))
        assert path.name in refused.value.problem
        assert path.read_text() == "# mine\n"
        assert {other: other.read_bytes() for other in made if other != path} == {
            other: content for other, content in before.items() if other != path
        }
        run(build(PlanConfig, {**flags, "overwrite": "true"}))
        assert {path: path.read_bytes() for path in made} == before
