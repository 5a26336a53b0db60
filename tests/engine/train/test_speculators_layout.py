# SPDX-License-Identifier: Apache-2.0
"""The speculators layout through vLLM's own reader of it; no engine is started."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

from shared.contracts.head_folder import read_head
from shared.contracts.head_variant import read_variant
from shared.errors import UserError
from shared.io.files import read_json
from stages.train.export.hf import export_head
from tests.quick.train.export.small_head import CONFIG, make_head

WINDOW = {"layer_types": ["sliding_attention"], "sliding_window": 64}
INNER = {
    "draft_vocab_size": 7,
    "target_hidden_size": 9,
    "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
    "norm_before_residual": True,
    "norm_before_fc": True,
    "fc_norm": True,
    "norm_output": True,
}
OWN = tuple(INNER)  # what the head states outside the layer's part


def test_vllm_reads_the_head_and_its_draft_length(tmp_path: Path) -> None:
    export_head(
        make_head(),
        tmp_path / "head",
        target="models/small",
        target_architectures=["LlamaForCausalLM"],
        provenance={},
        num_draft_tokens=5,
    )
    found = SpeculatorsConfig.from_pretrained(tmp_path / "head")
    assert found.architectures == ["Eagle3LlamaForCausalLM"]
    assert found.eagle_aux_hidden_state_layer_ids == list(CONFIG.aux_layers)
    assert found.norm_before_residual is False
    assert (found.draft_vocab_size, found.hidden_size) == (12, 16)
    assert found.rope_parameters["rope_theta"] == CONFIG.rope_theta
    speculative = SpeculatorsConfig.extract_vllm_speculative_config(
        read_json(tmp_path / "head" / "config.json")
    )
    assert speculative == {"method": "eagle3", "num_speculative_tokens": 5}


def rewritten(folder: Path, layer: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A head's config.json, changed in the layer's part and outside it; `...` leaves a key out."""
    export_head(
        make_head(), folder, target="models/small", target_architectures=["Llama"], provenance={}
    )
    raw = read_json(folder / "config.json")
    raw["transformer_layer_config"] |= layer
    raw |= own
    for part in (raw, raw["transformer_layer_config"]):
        for name in [name for name, value in part.items() if value is ...]:
            del part[name]
    (folder / "config.json").write_text(json.dumps(raw))
    return dict(raw)


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
@pytest.mark.parametrize(
    ("layer", "own"),
    [
        ({}, {}),
        ({}, dict.fromkeys(OWN, ...)),
        ({}, dict.fromkeys(OWN)),
        (INNER, dict.fromkeys(OWN, ...)),
        (INNER, dict.fromkeys(OWN)),
        (INNER, {"eagle_aux_hidden_state_layer_ids": []}),
        ({}, {**WINDOW, "hidden_size": 99, "attention_bias": True, "logit_scale": 2.0}),
        ({}, {"eagle_config": {"norm_before_fc": True}, "pard_token": 3}),
        ({"eagle_config": {"norm_before_fc": True}, "mask_token_id": 3}, {}),
        ({"model_type": "qwen3", **WINDOW}, {}),
        ({"model_type": ..., **WINDOW}, {}),
    ],
)
def test_what_is_read_is_what_vllm_reads(
    tmp_path: Path, kind: str, layer: dict[str, Any], own: dict[str, Any]
) -> None:
    raw = rewritten(
        tmp_path / "head", layer, {"speculators_model_type": kind, "mask_token_id": 5, **own}
    )
    found = read_head(tmp_path / "head").config
    theirs = SpeculatorsConfig.extract_transformers_pre_trained_config(copy.deepcopy(raw))
    beside = {"speculators_model_type", "parallel_drafting"}
    assert {name: found[name] for name in found.keys() - beside} == theirs


def test_a_layer_that_vllm_has_no_class_for_is_refused(tmp_path: Path) -> None:
    raw = rewritten(tmp_path / "head", {"model_type": "mistral"}, {})
    with pytest.raises(ValueError, match="Unsupported model_type mistral"):
        SpeculatorsConfig.extract_transformers_pre_trained_config(raw)
    with pytest.raises(UserError, match="found a layer of model_type 'mistral'"):
        read_head(tmp_path / "head")


@pytest.mark.parametrize("layout", ["hf", "speculators"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLMEagle3", "Eagle3Qwen3ForCausalLM"])
@pytest.mark.parametrize("used", [True, False, ...], ids=["used", "unused", "not said"])
def test_a_window_is_read_where_vllm_reads_one(
    tmp_path: Path, layout: str, model_type: str, architecture: str, used: Any
) -> None:
    layer = {"model_type": model_type, "use_sliding_window": used, **WINDOW}
    raw = rewritten(tmp_path / "head", layer, {"architectures": [architecture]})
    config: Any = SpeculatorsConfig
    if layout == "hf":  # which vLLM reads with transformers' own class
        config, flat = AutoConfig, raw["transformer_layer_config"]
        (tmp_path / "head" / "config.json").write_text(
            json.dumps({**flat, "architectures": [architecture]})
        )
    expected = config.from_pretrained(tmp_path / "head").sliding_window
    assert read_variant(read_head(tmp_path / "head").config).window == expected
