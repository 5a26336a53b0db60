# SPDX-License-Identifier: Apache-2.0
"""A target that vLLM does not run here, or serves no head to, is named before the first stage."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.ops.chain.machine import Machine
from stages.ops.chain.preflight import packages
from tests.quick.ops.chain.recipes import CONFIG, CPU, GIB, problems, steps


def with_config(workspace: Path, **changes: Any) -> None:
    (workspace / "model" / "config.json").write_text(json.dumps(CONFIG | changes))


def test_a_target_that_vllm_serves_no_head_to_is_named(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixtral = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    with_config(workspace, **mixtral)
    (found,) = problems(steps(workspace), workspace)
    assert "found MixtralForCausalLM, which does not in vLLM" in found
    assert "{model_impl: transformers}" in found
    wrapped = {"bench": {"engine_args": {"model-impl": "transformers"}}}
    assert problems(steps(workspace, wrapped), workspace) == []
    assert problems(steps(workspace)[:3], workspace) == []
    with_config(workspace, architectures=["MptForCausalLM"])
    found = problems(steps(workspace, wrapped), workspace)[-1]
    assert "which is no longer in vLLM" in found
    assert "Leave bench out (--skip bench)" in found
    with_config(workspace, **mixtral)
    installed_in = packages.installed
    monkeypatch.setattr(packages, "installed", lambda p: {**installed_in(p), "vllm": "9.9"})
    assert problems(steps(workspace), workspace) == []  # of which the table knows nothing


@pytest.mark.parametrize(
    ("config", "obstacle"),
    [
        ({"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}, "finds no embed_t"),
        ({"architectures": ["OPTForCausalLM"], "model_type": "opt"}, "finds no embed_tokens in it"),
        ({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "cannot replace its att"),
        (
            {"architectures": ["PaliGemmaForConditionalGeneration"], "vision_config": {}},
            "names no text model of a vision model",
        ),
        (
            {
                "architectures": ["Lfm2ForCausalLM"],
                "model_type": "lfm2",
                "layer_types": ["conv", "full_attention"] * 4,
            },
            "runs no layers that keep a state",
        ),
    ],
)
def test_a_target_that_vllm_s_wrapper_serves_no_head_to_is_named(
    workspace: Path, config: dict[str, Any], obstacle: str
) -> None:
    with_config(workspace, **config)
    wrapped = steps(workspace, {"bench": {"engine_args": {"model_impl": "transformers"}}})
    (found,) = [line for line in problems(wrapped, workspace) if line.startswith("bench: ")]
    assert f"{config['architectures'][0]}: vLLM" in found and obstacle in found
    assert "Leave bench out" in found
    (found,) = [line for line in problems(steps(workspace), workspace) if "SupportsEagle3" in line]
    assert "Leave bench out" in found and "model_impl" not in found


def test_a_target_that_vllm_runs_on_gpus_alone_is_named(workspace: Path) -> None:
    def found(machine: Machine, changes: dict[str, Any], **config: Any) -> list[str]:
        with_config(workspace, **config)
        lines = problems(steps(workspace, changes), workspace, machine)
        return [line.split(", or")[0] for line in lines if "a GPU, since" in line]

    laguna = {"architectures": ["LagunaForCausalLM"]}
    assert found(Machine((("Toy", GIB),), 64 * GIB, GIB), {}, **laguna) == []
    assert [line.split(":")[0] for line in found(CPU, {}, **laguna)] == ["synth", "bench"]
    kept = {"synth": {"mode": "keep"}}
    for backend in ("vllm", "auto"):
        captured = found(CPU, kept | {"dump": {"backend": backend}}, **laguna)
        assert [line.split(":")[0] for line in captured] == ["dump", "bench"]
    latent = {"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 16}
    for beside_a_head in (
        latent,
        {"architectures": ["NemotronHForCausalLM"], "mamba_num_heads": 4},
        {"architectures": ["NemotronHForCausalLM"], "layers_block_type": ["mamba"] * 8},
    ):
        (line,) = found(CPU, {"dump": {"backend": "auto"}}, **beside_a_head)
        assert line.startswith("bench: expected a GPU, since vLLM")
        assert line.endswith("found none. Take a machine with GPUs")
    ungated = {"architectures": ["NemotronHForCausalLM"], "layers_block_type": ["moe"] * 8}
    assert [line.split(":")[0] for line in found(CPU, {}, **ungated)] == ["synth", "bench"]
    sparse = {"architectures": ["DeepseekV32ForCausalLM"], "kv_lora_rank": 16}
    lines = found(CPU, {"dump": {"backend": "auto"}}, **sparse)  # which takes transformers
    assert [line.split(":")[0] for line in lines] == ["synth", "bench"]


def test_what_vllm_imports_for_a_vision_model_is_asked_for(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def found(**changes: Any) -> list[str]:
        lines = problems(steps(workspace, changes), workspace)
        return [line for line in lines if "torchvision" in line]

    installed_in = packages.installed
    with_config(workspace, architectures=["Qwen3VLForConditionalGeneration"], vision_config={})
    for extra, stages in (({}, ["synth", "dump", "bench"]), ({"torchvision": "0.28.0"}, [])):
        installed = installed_in(sys.executable) | extra
        monkeypatch.setattr(packages, "installed", lambda _, installed=installed: installed)
        lines = found(dump={"backend": "vllm"})
        assert [line.split(":")[0] for line in lines] == stages
        assert ("no head was tried beside a vision model" in caplog.text) == bool(extra)
    monkeypatch.setattr(packages, "installed", installed_in)
    lines = found(synth={"mode": "keep"}, dump={"backend": "auto"})
    assert [line.split(":")[0] for line in lines] == ["bench"]
