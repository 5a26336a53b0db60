# SPDX-License-Identifier: Apache-2.0
"""A plan's recipe is one that every stage takes."""

from pathlib import Path

import pytest
import yaml

from shared.config import build
from stages.bench.config import BenchConfig
from stages.dump.config import DumpConfig
from stages.ops.plan.architecture import understand
from stages.ops.plan.model import make_plan
from stages.ops.plan.output import recipe
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
