# SPDX-License-Identifier: Apache-2.0
"""Heads held to the parameters that vLLM itself builds for them: both ways, in every layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.prompts.rows import Prompt, Turn
from shared.settings import build
from shared.vllm.measured_rows import conversation_of
from stages.bench import head_check
from stages.bench.config import BenchConfig
from stages.bench.measure import plans
from tests.heads import write_random_head
from tests.models import tiny_llama

pytestmark = pytest.mark.engine

Config = dict[str, Any]
Weights = dict[str, torch.Tensor]
Change = Callable[[Config, Weights], None]
H = 128
Q = "midlayer.self_attn.q_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    target = tiny_llama(folder / "tiny", max_length_tokens=512)
    write_random_head(folder / "whole", target=target, draft_vocab_size=128)
    write_random_head(folder / "full", target=target)
    return folder


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same question and answer, without an import of vLLM for each."""
    from stages.bench import ask_vllm

    def ask(question: dict[str, Any], work: Path) -> dict[str, Any]:
        (work / "question.json").write_text(json.dumps(question))
        assert ask_vllm.main(work / "question.json", work / "answer.json") == 0
        return dict(json.loads((work / "answer.json").read_text()))

    monkeypatch.setattr(head_check, "_ask", ask)


def check(workspace: Path, folder: Path, work: Path, **flags: str) -> None:
    settings = {"target": "tiny", "workspace": str(workspace), "max_tokens": "16", **flags}
    config = build(BenchConfig, settings)
    prompt = Prompt("p", (Turn(({"role": "user", "content": "Why?"},)),))
    plan = plans.plan_of(config, workspace / "tiny", [conversation_of(prompt)])
    own = head_check.needed_settings(folder)
    speculative = plans.drafters_of(config, folder, own)["head"]
    assert speculative
    work.mkdir(exist_ok=True)
    head_check.check_in_vllm(plan, folder, speculative, work)


def changed(place: Path, folder: Path, change: Change, *, source: str = "whole") -> Path:
    shutil.copytree(place / source, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    change(config, weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def add(**tensors: list[int]) -> Change:
    """Tensors whose names have double underscores for dots."""
    return lambda config, weights: weights.update(
        {name.replace("__", "."): torch.ones(shape) for name, shape in tensors.items()}
    )


def drop(*names: str) -> Change:
    def change(config: Config, weights: Weights) -> None:
        for name in names:
            del weights[name]

    return change


def flags(**values: Any) -> Change:
    return lambda config, weights: config.update(values)


def both(*changes: Change) -> Change:
    def change(config: Config, weights: Weights) -> None:
        for each in changes:
            each(config, weights)

    return change


def parallel(width: int) -> Change:
    """A P-EAGLE head with a mask of so many values."""
    return both(flags(pard_token=0), add(mask_hidden=[1, width]))


def prefixed(config: Config, weights: Weights) -> None:
    renamed = {f"model.{name}": weights.pop(name) for name in list(weights) if "midlayer" in name}
    weights.update(renamed)


def narrower(config: Config, weights: Weights) -> None:
    """Half as wide as its target, which then cannot lend its embedding."""
    from tests.heads import random_weights

    config["hidden_size"] = H // 2
    weights.clear()
    weights.update(random_weights(config))
    weights["fc.weight"] = torch.ones(H // 2, 3 * H)


def shorter_mlp(config: Config, weights: Weights) -> None:
    config["intermediate_size"] = config["intermediate_size"] // 2


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (drop("norm.weight"), r"model.norm.weight \[128\] stays as it was allocated"),
        (drop("fc.weight"), "model.fc.weight"),
        (drop("midlayer.mlp.up_proj.weight"), "gate_up_proj.weight"),
        (drop(f"{Q}.weight"), "qkv_proj.weight"),
        (drop("lm_head.weight"), "lm_head.weight"),
        (flags(num_hidden_layers=2), "model.layers.1"),
        (add(**{f"{Q.replace('.', '__')}__bias": [128]}), f"{Q}.bias"),
        (flags(attention_bias=True), "qkv_proj.bias"),
        (flags(mlp_bias=True), "gate_up_proj.bias"),
        (add(midlayer__mlp__down_proj__bias=[H]), "down_proj.bias"),
        (add(fc__bias=[H]), "fc.bias"),
        (narrower, "embed_tokens.weight"),
        (shorter_mlp, "mlp.gate_proj.weight"),
        (prefixed, "model.midlayer"),
        (flags(model_type="qwen3", architectures=["Eagle3Qwen3ForCausalLM"]), "q_norm.weight"),
        (flags(norm_before_fc=True), "input_norm.weight"),
        (flags(eagle_config={"norm_before_fc": True}), "input_norm.weight"),
        (add(input_norm__weight=[3 * H]), "input_norm.weight is not read whole"),
        (flags(fc_norm=True), "fc_norm.0.weight"),
        (add(fc_norm__0__weight=[H]), "fc_norm.0.weight"),
        (flags(eagle_config={"use_aux_hidden_state": False}), "fc.weight"),
        (parallel(H), "mask_hidden is refused"),
        (both(parallel(3 * H), drop("norm.weight")), "allocated"),
    ],
)
def test_what_vllm_would_make_up_or_drop_is_refused_by_name(
    place: Path, tmp_path: Path, change: Change, reported: str
) -> None:
    with pytest.raises(UserError, match=reported) as refused:
        check(place, changed(place, tmp_path / "head", change), tmp_path / "work")
    assert refused.value.code == "head-misread"


def biased(config: Config, weights: Weights) -> None:
    config["attention_bias"] = True
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = weights[f"midlayer.self_attn.{name}.weight"]
        weights[f"midlayer.self_attn.{name}.bias"] = torch.ones(len(weight))
    weights["midlayer.self_attn.o_proj.bias"] = torch.ones(H)


@pytest.mark.parametrize(
    ("source", "change"),
    [
        ("whole", flags()),
        ("full", flags()),
        ("full", drop("lm_head.weight")),
        (
            "whole",
            both(flags(fc_norm=True), add(**{f"fc_norm__{i}__weight": [H] for i in range(3)})),
        ),
        ("whole", both(flags(norm_before_fc=True), add(input_norm__weight=[3 * H]))),
        ("whole", add(embed_tokens__weight=[512, H])),
        ("whole", parallel(3 * H)),
        ("full", parallel(3 * H)),
        ("whole", drop("t2d")),
    ],
)
def test_what_vllm_serves_is_accepted(
    place: Path, tmp_path: Path, source: str, change: Change
) -> None:
    folder = changed(place, tmp_path / "head", change, source=source)
    check(place, folder, tmp_path / "work")


@pytest.mark.parametrize("aux_layers", [(2, 5), (2, 4, 5), (1, 2, 4, 5), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("layout", ["hf", "speculators"])
def test_both_layouts_that_train_writes_fit_for_any_number_of_aux_layers(
    place: Path, tmp_path: Path, aux_layers: tuple[int, ...], layout: str
) -> None:
    from shared.contracts.head_config import HeadConfig
    from stages.train.export.hf import export_head
    from stages.train.model import DraftHead

    raw = json.loads((place / "tiny" / "config.json").read_text())
    config = HeadConfig.from_json(raw, aux_layers=aux_layers, draft_vocab_size=128)
    d2t = torch.zeros(128, dtype=torch.int64)
    head = DraftHead(config, embed_tokens=torch.zeros(512, H), d2t=d2t)
    out = tmp_path / layout
    if layout == "hf":
        export_head(head, out, target="tiny", provenance={})
    else:
        names = ["LlamaForCausalLM"]
        export_head(head, out, target="tiny", target_architectures=names, provenance={})
    check(place, out, tmp_path / "work")
    if len(aux_layers) != 3:  # without the number of them vLLM expects three
        written = json.loads((out / "config.json").read_text())
        written.pop("eagle_config", None)
        written.get("transformer_layer_config", {}).pop("num_aux_hidden_states", None)
        (out / "config.json").write_text(json.dumps(written))
        with pytest.raises(UserError, match=r"fc.weight is (refused|not read)"):
            check(place, out, tmp_path / "work")


def test_options_that_vllm_does_not_have(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found \['no_such_option'\]"):
        check(place, place / "whole", tmp_path, engine_args="{no_such_option: 1}")
    with pytest.raises(UserError, match="expected at most 128"):
        check(place, place / "whole", tmp_path, num_speculative_tokens="129", max_tokens="2")
