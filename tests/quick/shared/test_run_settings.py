# SPDX-License-Identifier: Apache-2.0
"""The template's switches stand once, in `run`, for every stage."""

from pathlib import Path

import pytest

from shared.config import RunConfig, build
from shared.errors import UserError
from stages.bench.config import BenchConfig
from stages.dump.config import DumpConfig
from stages.synth.config import SynthConfig


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
