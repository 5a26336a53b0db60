# SPDX-License-Identifier: Apache-2.0
"""The adapter against transformers: logits from the final state, for families nobody listed in it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import UserError
from shared.io.safetensors_files import TensorInfo, list_tensors
from shared.target.adapter import output_layer
from shared.target.classes import class_config
from shared.target.model import parse_config, read_config
from shared.target.probe import UnknownRuleError, norm_rule
from shared.target.tensors import read_tensors
from tests import targets
from tests.quick.shared.target import targets_page

REFUSED = {"phi": "target-head-bias"}
IDS = torch.tensor([[5, 17, 101, 7, 300, 42]])


def final_state_and_logits(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(input of the last norm that runs before lm_head, logits), both [n, ...], by the model."""
    inputs: list[torch.Tensor] = []
    text = model.get_output_embeddings()
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    seen: list[torch.Tensor] = []
    text.register_forward_pre_hook(lambda *_: seen.append(inputs[-1]))
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
    return seen[-1][0], logits[0]


@pytest.mark.parametrize("name", targets.FAMILIES)
def test_logits_are_the_models_own(name: str, tmp_path: Path) -> None:
    model = targets.make(name, tmp_path)
    assert targets_page.row(name, tmp_path) in targets_page.PAGE.read_text().splitlines()
    config = read_config(tmp_path)
    if name in REFUSED:
        with pytest.raises(UserError) as refused:
            read_tensors(config)
        assert refused.value.code == REFUSED[name]
        return
    final, expected = final_state_and_logits(model)
    tensors = read_tensors(config)
    assert expected.std() > 0.1
    assert (tensors.logits(final) - expected).abs().max() < 1e-4
    assert torch.equal(tensors.embed_tokens, model.get_input_embeddings().weight)


def test_the_page_lists_these_families_alone() -> None:
    lines = targets_page.PAGE.read_text().removeprefix(targets_page.HEAD).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == list(targets.FAMILIES)


def test_names_are_found_under_any_prefix_and_further_models_are_not_taken(tmp_path: Path) -> None:
    """A speech model beside the text model, and a layer that predicts one token more."""
    targets.make("qwen3", tmp_path)
    config = read_config(tmp_path)
    plain = list_tensors(tmp_path)
    moved = {f"thinker.{name}": tensor for name, tensor in plain.items()}
    small: TensorInfo = {"dtype": "BF16", "shape": [64]}
    for name in ("talker.model.norm.weight", "talker.model.embed_tokens.weight", "mtp.norm.weight"):
        moved[name] = small
    layer = output_layer(config, moved)
    assert layer.embedding == "thinker.model.embed_tokens.weight"
    assert layer.norm_weight == "thinker.model.norm.weight"
    assert layer.lm_head == "thinker.lm_head.weight"


@pytest.mark.parametrize("explicit", [None, False])
def test_lm_head_is_the_embedding_where_the_class_ties_them(
    tmp_path: Path, explicit: bool | None
) -> None:
    targets.make("gemma2", tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    raw.pop("tie_word_embeddings", None)
    path.write_text(json.dumps(raw | ({} if explicit is None else {"tie_word_embeddings": False})))
    if explicit is None:
        tensors = read_tensors(read_config(tmp_path))
        assert tensors.lm_head is tensors.embed_tokens
        return
    with pytest.raises(UserError) as refused:
        read_tensors(read_config(tmp_path))
    assert refused.value.code == "target-head-missing"


@pytest.mark.parametrize("name", ["bamba", "falcon_h1"])  # their time_step_limit ends at infinity
def test_a_config_with_floats_that_json_has_no_words_for(name: str, tmp_path: Path) -> None:
    saved = targets.CONFIG_MAPPING[name](num_hidden_layers=2, hidden_size=128, vocab_size=64)
    saved.save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    config = class_config(read_config(tmp_path))
    assert config.time_step_limit[1] == float("inf")  # type: ignore[attr-defined]


class OddNorm(torch.nn.Module):
    """Divides by the sum of magnitudes, as no rule of ours does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.weight * states / states.abs().sum(-1, keepdim=True)


def test_a_norm_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(UnknownRuleError, match="neither an RMSNorm nor a LayerNorm"):
        norm_rule(OddNorm(), 8)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"text_config": "llama"}, "settings as text_config, found str"),
        ({"text_config": [1]}, "settings as text_config, found list"),
        ({"num_hidden_layers": -1}, "whole numbers above 0"),
        ({"hidden_size": "wide"}, "whole numbers above 0"),
    ],
)
def test_a_config_of_another_shape_is_refused(change: dict[str, Any], told: str) -> None:
    sizes = {"num_hidden_layers": 8, "hidden_size": 64, "vocab_size": 100}
    with pytest.raises(UserError, match=told):
        parse_config({"model_type": "llama", **sizes, **change}, Path("config.json"))
