# SPDX-License-Identifier: Apache-2.0
"""What a config.json says of a target, and what its class adds."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from shared.errors import UserError
from stages.ops.plan.architecture import understand
from stages.ops.plan.model import make_plan
from stages.ops.plan.output import as_json, recipe, show
from tests.quick.ops.plan.well_known import config_of, plan_of, settings


def test_sizes_that_a_config_leaves_out_are_its_class_s() -> None:
    plan = plan_of("gemma-3-27b-it")
    assert "vocab_size" not in config_of("gemma-3-27b-it")["text_config"]
    assert plan.target.target.vocab_size == 262208
    assert plan.head.max_position_embeddings == 131072


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "found list"),
        (
            {"model_type": "siglip_vision_model"},
            "expected whole numbers above 0 as num_hidden_layers",
        ),
        ({"text_config": {"hidden_size": "x"}}, "no class for the model_type None"),
    ],
)
def test_what_is_no_decoder_is_refused(raw: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        understand(raw, "config.json")


TOY = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "vocab_size": 10,
}


def whole_plan(raw: dict[str, Any]) -> None:
    plan = make_plan("toy", understand(raw, "toy/config.json"))
    recipe(plan, settings())
    json.dumps(as_json(plan, settings()))
    show(plan, settings(), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, ("32k", [8], {"a": 8}, float("inf"), 0.5, -1)) for name in (
            "max_position_embeddings", "sliding_window",
        )),
        *((name, ("8x", [[8]], {"a": 8}, float("inf"), 0.5, -1)) for name in (
            "n_routed_experts", "num_experts_per_tok",
        )),
        ("model_type", (["llama"], {}, 5)),
        ("architectures", ("LlamaForCausalLM", 5, {"a": 1})),
        ("layer_types", (5, "full_attention", True)),
        ("layers_block_type", (5, {"a": 1})),
        ("text_config", ({}, {"a": 1}, 5, [])),
    ],
)  # fmt: skip
def test_a_setting_of_another_kind_is_refused_by_name(name: str, values: tuple[object]) -> None:
    for value in values:
        with pytest.raises(UserError, match=name):
            whole_plan({**TOY, "n_routed_experts": 4, "num_experts_per_tok": 2, name: value})


@pytest.mark.parametrize("value", ["8x", {}, float("inf"), [8, "x"], []])
def test_an_experts_width_is_a_number_or_one_for_each_layer(value: object) -> None:
    raw = {**TOY, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 2}
    plan = make_plan("toy", understand({**raw, "moe_intermediate_size": [4, 6]}, "toy"))
    assert plan.target.expert_width == 6
    with pytest.raises(UserError, match="moe_intermediate_size"):
        whole_plan({**raw, "moe_intermediate_size": value or {"a": 1}})


@pytest.mark.parametrize("value", [5, "lm_head", {"a": 1}, float("inf")])
def test_modules_to_keep_are_a_list(value: object) -> None:
    how = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(UserError, match="modules_to_not_convert"):
        whole_plan({**TOY, "quantization_config": {**how, "modules_to_not_convert": value}})
    whole_plan({**TOY, "quantization_config": {**how, "modules_to_not_convert": None}})
