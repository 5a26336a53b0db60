# SPDX-License-Identifier: Apache-2.0
"""The template's switches stand once, in `run`, for every stage."""

import re
from pathlib import Path

import pytest

from shared.config import RunConfig, StageConfig
from shared.errors import UserError
from shared.settings import build, flag_fields
from stages.bench.config import BenchConfig
from stages.dump.config import DumpConfig
from stages.synth.config import SynthConfig
from stages.train.commands import CurveConfig
from stages.train.config import TrainConfig


def test_reasoning_and_switches_become_the_templates_variables() -> None:
    assert RunConfig(target="t").template_kwargs == {}
    assert RunConfig(target="t", reasoning="drop").template_kwargs == {}
    off = {"enable_thinking": False, "thinking": False, "thinking_budget": 0}
    assert RunConfig(target="t", reasoning="disable").template_kwargs == off
    explicit = RunConfig(
        target="t", reasoning="disable", chat_template_kwargs={"thinking": "low", "date": "x"}
    )
    given = {"enable_thinking": False, "thinking": "low", "thinking_budget": 0, "date": "x"}
    assert explicit.template_kwargs == given


def test_every_stage_takes_them_as_flags_and_in_its_identity() -> None:
    flags = {"target": "t", "reasoning": "disable", "chat_template_kwargs": "{a: 1}"}
    for config, own in ((SynthConfig, {"prompts": "p"}), (DumpConfig, {}), (BenchConfig, {})):
        built = build(config, {**flags, **own})
        assert built.run.template_kwargs["a"] == 1
        assert built.identity()["run.reasoning"] == "disable"
        assert built.identity()["run.chat_template_kwargs"] == {"a": 1}


def test_a_key_of_run_in_a_stages_section_is_refused_with_its_right_section(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {target: t}\nsynth: {prompts: p, reasoning: disable}\n")
    with pytest.raises(UserError, match=r"synth\.reasoning: .* move it to the section `run`"):
        build(SynthConfig, {"recipe": str(recipe)})


STAGES: tuple[tuple[type[StageConfig], dict[str, str]], ...] = (
    (SynthConfig, {"prompts": "p"}),
    (DumpConfig, {}),
    (TrainConfig, {}),
    (BenchConfig, {}),
    (CurveConfig, {}),
)


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "1e999"])
@pytest.mark.parametrize("config, own", STAGES, ids=lambda each: str(each)[-14:])
def test_no_number_is_infinite_or_nan(
    config: type[StageConfig], own: dict[str, str], text: str
) -> None:
    fields = flag_fields(config).items()
    numbers = [name for name, field in fields if re.search(r"\bfloat\b", str(field.annotation))]
    assert len(numbers) > 2
    for name in numbers:
        with pytest.raises(UserError, match=rf"({config.section}\.|--){name}\b") as refused:
            build(config, {"target": "t", **own, name: text})
        assert refused.value.code == "setting-invalid"


@pytest.mark.parametrize(
    ("config", "recipe", "told"),
    [
        (TrainConfig, "train: {max_grad_norm: .inf}", "train.max_grad_norm: .* found inf"),
        (TrainConfig, "train: {epochs: .nan}", "train.epochs: .* finite number"),
        (BenchConfig, "bench: {min_speedup: .nan}", "bench.min_speedup: .* found nan"),
        (BenchConfig, "bench: {temperatures: [0, .inf]}", "bench.temperatures"),
        (BenchConfig, "bench: {engine_args: {a: [{b: .inf}]}}", r"bench.engine_args: .*a\.0\.b"),
        (BenchConfig, "bench: {speculative_args: {x: -.inf}}", r"bench.speculative_args: .* x"),
        (DumpConfig, "dump: {engine_args: {.nan: 1}}", "dump.engine_args"),
        (DumpConfig, "dump: {engine_args: {a: {.nan: 1}}}", "dump.engine_args: .* a.nan"),
        (SynthConfig, "synth: {prompts: {p: .inf}}", "synth.prompts"),
        (SynthConfig, "synth: {prompts: p, sampling: {top_p: .nan}}", "synth.sampling.*top_p"),
        (TrainConfig, "run: {target: t, chat_template_kwargs: {a: .nan}}", "run.chat_template_kw"),
    ],
    ids=lambda each: str(each)[-40:],
)
def test_no_number_of_a_recipe_is_infinite_or_nan(
    config: type[StageConfig], recipe: str, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{'' if 'run:' in recipe else 'run: {target: t}'}\n{recipe}\n")
    with pytest.raises(UserError, match=told):
        build(config, {"recipe": str(path)})


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_a_seed_is_one_that_every_engine_takes(seed: str) -> None:
    """vLLM seeds numpy too, which takes 32 bits."""
    with pytest.raises(UserError, match=r"run\.seed"):
        build(TrainConfig, {"target": "t", "seed": seed})
    assert build(TrainConfig, {"target": "t", "seed": str(2**32 - 1)}).run.seed == 2**32 - 1
