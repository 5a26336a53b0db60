# SPDX-License-Identifier: Apache-2.0
"""A target that is not there, not whole or does not fit is named before the first stage."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file

from stages.ops.chain.machine import Machine
from tests.quick.ops.chain.recipes import CONFIG, GIB, KEPT, ROOT, TENSORS, problems, steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"draft_vocab_size": 600}}, "at most the target's 512 tokens, found 600"),
        ({"run": {"max_length_tokens": 999}}, "at most the target's 256 positions, found 999"),
        ({"run": {"aux_layers": [2, 4, 8]}}, r"each 0 <= id < 8 .*found \[2, 4, 8\]"),
        (
            {"run": {"target": "modle"}},
            "run.target: expected a model's folder at .*modle, or a hub id",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_its_target_is_named(
    workspace: Path, changes: dict[str, dict[str, Any]], message: str
) -> None:
    (found,) = problems(steps(workspace, changes), workspace)
    assert re.search(message, found)


def test_a_target_without_what_it_needs_is_named(workspace: Path) -> None:
    whole = steps(workspace)
    (workspace / "model" / "tokenizer_config.json").write_text("{}")
    (found,) = problems(whole, workspace)
    assert "expected a chat template" in found
    (workspace / "model" / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    custom = CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    (workspace / "model" / "config.json").write_text(json.dumps(custom))
    assert problems(whole, workspace) == []  # transformers has code of its own for it
    (workspace / "model" / "config.json").write_text(json.dumps({**custom, "model_type": "mine"}))
    (found,) = problems(whole, workspace)
    assert "run.trust_remote_code: expected true" in found
    assert problems(steps(workspace, {"run": {"trust_remote_code": True}}), workspace) == []


@pytest.mark.parametrize(
    ("config", "without", "message"),
    [
        ({}, "lm_head.weight", "expected a tensor lm_head.weight, since LlamaForCausalLM does not"),
        ({}, "model.norm.weight", "expected the tensors embed_tokens.weight and norm.weight"),
        ({"vocab_size": 500}, "", r"model.embed_tokens.weight of shape \[500, 64\]"),
        ({"architectures": ["PhiForCausalLM"], "model_type": "phi"}, "", "lm_head has a bias"),
        (
            {"model_type": "mine", "architectures": ["Mine"]},
            "",
            "no class for the model_type 'mine'",
        ),
        ({"hidden_act": "none of it"}, "", "transformers' class for llama does not take it"),
    ],
)
def test_a_target_that_train_cannot_take_is_named_before_the_first_stage(
    workspace: Path, config: dict[str, Any], without: str, message: str
) -> None:
    tensors = {name: value for name, value in TENSORS.items() if name != without}
    save_file(tensors, workspace / "model" / "model.safetensors")
    (workspace / "model" / "config.json").write_text(json.dumps(CONFIG | config))
    (found,) = problems(steps(workspace), workspace)
    assert re.search(message, found)


def test_a_quantised_output_layer_sends_to_the_original(workspace: Path) -> None:
    packed = TENSORS | {"lm_head.weight": torch.zeros(512, 32, dtype=torch.uint8)}
    save_file(packed, workspace / "model" / "model.safetensors")
    (found,) = problems(steps(workspace), workspace)
    assert (
        "expected lm_head.weight in 16 or 32 bits, found U8. Name the 16-bit original in" in found
    )


def test_scaled_positions_reach_further_than_the_config_says(workspace: Path) -> None:
    long = steps(workspace, {"run": {"max_length_tokens": 999}})
    assert len(problems(long, workspace)) == 1
    scaled = CONFIG | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    (workspace / "model" / "config.json").write_text(json.dumps(scaled))
    assert problems(long, workspace) == []


@pytest.mark.parametrize(
    "recipe", ["demo/recipe", "smoke/recipe", "smollm2/quarter", "smollm2/night"]
)
def test_a_recipe_s_target_that_is_not_there_yet_is_named_with_what_makes_it(
    workspace: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = ROOT / "compose" / "recipes" / f"{recipe}.yaml"
    name = yaml.safe_load(path.read_text())["run"]["target"]
    (told,) = problems(steps(workspace, {"run": {"target": name}}), workspace)
    (command,) = re.findall(rf" `(make [^`]*)` makes {name}\.$", told)
    made = subprocess.run(
        ["make", "--dry-run", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert f"workspace/{name}" in made.stdout
    (told,) = problems(steps(workspace, {"run": {"target": "nobody/demo"}}), workspace)
    assert "make" not in told


def test_the_hub_is_asked_only_where_it_must_be(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = steps(workspace, {"run": {"target": "nobody/nothing"}})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (offline,) = problems(found, workspace)
    assert "nobody/nothing in the hub's cache, found none, offline" in offline


@pytest.mark.usefixtures("cuda_torch")
def test_too_little_memory_for_the_target_is_named(workspace: Path) -> None:
    whole = steps(workspace)
    (memory,) = {line.split(": ", 1)[1] for line in problems(whole, workspace, Machine((), 9, GIB))}
    assert "GiB for the target's weights, found CPU" in memory

    small = Machine((("Toy", 500),) * 2, 64 * GIB, GIB)
    found = problems(whole, workspace, small)
    assert len(found) == 3  # synth, dump and bench load the target; train does not
    assert all("a GPU for the target's weights" in line for line in found)
    halves = steps(workspace, {name: {"tensor_parallel_size": 4} for name in ("synth", "bench")})
    found = problems(halves, workspace, Machine((("Toy", 100_000),) * 2, 64 * GIB, GIB))
    assert ["expected 4 GPUs" in line for line in found] == [True, True]


@pytest.mark.usefixtures("cuda_torch")
def test_a_target_that_hf_spreads_over_the_gpus_is_shared_by_them_all(workspace: Path) -> None:
    pair = Machine((("Toy", 100_000),) * 2, 64 * GIB, GIB)  # a half fits one, the whole none
    assert [line.split("'")[0] for line in problems(steps(workspace), workspace, pair)] == [
        "synth",
        "bench",
    ]
    alone = Machine((("Toy", 100_000),), 64 * GIB, GIB)
    (told,) = [x for x in problems(steps(workspace), workspace, alone) if x.startswith("dump's")]
    assert "Take a machine with more" in told
    roomy = Machine((("Toy", GIB),) * 2, 64 * GIB, GIB)
    two = steps(workspace, {"dump": {"data_parallel": 2}})  # of which each takes one GPU
    assert problems(two, workspace, roomy) == []


@pytest.mark.usefixtures("cuda_torch")
@pytest.mark.parametrize("machine", [Machine((), 9, GIB), Machine((("Toy", 9),), 64 * GIB, GIB)])
def test_answers_that_are_kept_need_no_memory_for_the_target(
    workspace: Path, machine: Machine
) -> None:
    kept = steps(workspace, {"synth": KEPT})
    found = problems(kept, workspace, machine)
    assert [line.split("'")[0] for line in found] == ["dump", "bench"]


def test_too_little_disk_is_named(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    (disk,) = problems(steps(workspace), workspace)
    assert "for hidden states and checkpoints, found 0.0 GB" in disk
