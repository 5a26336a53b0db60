# SPDX-License-Identifier: Apache-2.0
"""A plan's recipe is one that every stage takes."""

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from shared.errors import UserError
from shared.paths import RunPaths
from shared.settings import build
from shared.target.model import read_config
from stages.bench.config import BenchConfig
from stages.dump.config import DumpConfig
from stages.ops.chain.preflight.bench_prompts import room_problems
from stages.ops.chain.preflight.settings import setting_problems
from stages.ops.chain.processes import Step
from stages.ops.plan.architecture import understand
from stages.ops.plan.model import Plan, make_plan
from stages.ops.plan.output import as_json, recipe, show
from stages.synth.config import SynthConfig
from stages.train.config import TrainConfig
from tests.quick.ops.plan.well_known import KNOWN, config_of, plan_of, settings


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("gpu", ["H100", "GB200"])
def test_every_stage_takes_the_recipe(name: str, gpu: str, tmp_path: Path) -> None:
    plan = plan_of(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(plan, settings(gpu=gpu, target="org/model")))
    flags = {"recipe": str(path), "workspace": str(tmp_path)}
    synth, dump, train, _ = (
        build(stage, flags) for stage in (SynthConfig, DumpConfig, TrainConfig, BenchConfig)
    )
    assert synth.run.target == "org/model"
    assert synth.tensor_parallel_size == plan.placements[gpu].tensor_parallel
    assert dump.backend == KNOWN[name][2]
    width = train.intermediate_size or config_of(name).get("intermediate_size")
    assert (width or plan.target.text["intermediate_size"]) == KNOWN[name][3]


def test_a_shallow_target_gets_aux_layers_that_fit() -> None:
    raw = {**config_of("llama-3.2-1b-instruct"), "num_hidden_layers": 5}
    plan = make_plan("toy", understand(raw, "toy"))
    assert plan.head.aux_layers == (1, 2, 4)
    made = yaml.safe_load(recipe(plan, settings()))
    assert made["run"]["aux_layers"] == [1, 2, 4]
    by_gpu = {"L4": 64, "L40S": 256, "A100-40": 256, "H100": 512}
    made = {gpu: yaml.safe_load(recipe(plan, settings(gpu=gpu))) for gpu in by_gpu}
    assert {gpu: found["synth"]["concurrency"] for gpu, found in made.items()} == by_gpu


def toy(**changes: int) -> Plan:
    raw = {**config_of("llama-3.2-1b-instruct"), **changes}
    return make_plan("toy", understand(raw, "toy"))


@pytest.mark.parametrize("positions", [64, 256, 400, 600])
def test_bench_s_answers_have_room_in_a_short_target(positions: int, tmp_path: Path) -> None:
    plan = toy(max_position_embeddings=positions)
    (tmp_path / "recipe.yaml").write_text(recipe(plan, settings(samples="2", target="toy")))
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "config.json").write_text(json.dumps(plan.target.raw))
    flags = {"recipe": str(tmp_path / "recipe.yaml"), "workspace": str(tmp_path)}
    stages = {"synth": SynthConfig, "train": TrainConfig, "bench": BenchConfig}
    steps = [
        Step(stage, build(config, flags).model_dump(mode="json"), done=False)
        for stage, config in stages.items()
    ]
    assert list(setting_problems(steps, RunPaths(tmp_path, "toy"))) == []
    assert list(room_problems(steps[-1], read_config(tmp_path / "toy"), tmp_path)) == []
    assert max(steps[-1].settings["max_tokens"]) == min(256, positions // 2)


def test_a_plan_is_for_rows_enough_to_hold_one_out() -> None:
    with pytest.raises(UserError, match=r"samples: expected at least 2"):
        settings(samples="1")


@pytest.mark.parametrize(("samples", "gate"), [("900", 0), ("5000", 1.3)])
def test_a_recipe_says_what_bench_requires_of_its_rows(samples: str, gate: float) -> None:
    made = recipe(plan_of("llama-3.1-8b-instruct"), settings(samples=samples))
    assert yaml.safe_load(made)["bench"]["min_acceptance_length"] == gate
    assert ("# bench requires no acceptance length" in made) == (gate == 0)


def test_states_are_counted_for_rows_as_long_as_the_target_has_positions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan, long = toy(max_position_embeddings=256), settings(samples="10", length="1000000")
    fitting = settings(samples="10", length="256")
    assert as_json(plan, long)["dump_bytes"] == as_json(plan, fitting)["dump_bytes"]
    show(plan, long, Console(width=160))
    shown = capsys.readouterr().out
    assert "at 256 tokens each" in shown and "1000000" not in shown
