# SPDX-License-Identifier: Apache-2.0
"""Heads from anywhere: what a glance at the files shows of a misreading, refused or warned of."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.contracts.head_folder import read_head
from shared.errors import UserError
from shared.target.model import TargetConfig, read_config
from stages.bench import head_check as head
from tests.heads import write_random_head
from tests.models import tiny_llama

Config = dict[str, Any]
Weights = dict[str, torch.Tensor]
DRAFT = 128


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    target = tiny_llama(folder / "tiny", max_length_tokens=256)
    write_random_head(folder / "whole", target=target, draft_vocab_size=DRAFT)
    write_random_head(folder / "full", target=target)
    return folder


@pytest.fixture
def target(made: Path) -> TargetConfig:
    return read_config(made / "tiny")


Change = Callable[[Config, Weights], None]


def changed(made: Path, folder: Path, change: Change, *, of: str = "whole") -> Path:
    shutil.copytree(made / of, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    change(config, weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_our_own_heads_raise_no_word(made: Path, target: TargetConfig) -> None:
    assert head.check(made / "whole", target) == []
    assert head.check(made / "full", target) == []  # D = V, no d2t


def set_config(**values: Any) -> Change:
    return lambda config, weights: config.update(values)


def drop(*names: str) -> Change:
    def change(config: Config, weights: Weights) -> None:
        for name in names:
            config.pop(name, None)
            weights.pop(name, None)

    return change


def nested_only(ids: list[int]) -> Change:
    def change(config: Config, weights: Weights) -> None:
        del config["eagle_aux_hidden_state_layer_ids"]
        config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = ids

    return change


def absolute_ids(config: Config, weights: Weights) -> None:
    weights["d2t"] = weights["d2t"] + torch.arange(DRAFT)


def twice(config: Config, weights: Weights) -> None:
    weights["d2t"][1] = weights["d2t"][0] - 1


def halved(config: Config, weights: Weights) -> None:
    weights["d2t"] = weights["d2t"][: DRAFT // 2]


def ids_that_could_be_offsets(config: Config, weights: Weights) -> None:
    """Each second token, by absolute ids: as offsets they are distinct ids of the target too."""
    marked = 2 * torch.arange(DRAFT)
    weights["d2t"] = marked
    weights["t2d"] = torch.zeros_like(weights["t2d"]).index_fill(0, marked, 1)


def ids_that_nothing_contradicts(config: Config, weights: Weights) -> None:
    """The same without `t2d`, which engines do not need."""
    ids_that_could_be_offsets(config, weights)
    del weights["t2d"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (set_config(vocab_size=1024), "for another target"),
        (set_config(target_hidden_size=None), "target_hidden_size is null"),
        (set_config(target_hidden_size=64), "for another target"),
        (drop("vocab_size"), r"found no \['vocab_size'\]"),
        (drop("d2t"), "it has no d2t"),
        (set_config(draft_vocab_size=None), "Set draft_vocab_size"),
        (absolute_ids, "Absolute ids are not offsets"),
        (twice, "1 twice"),
        (halved, "one a draft token"),
        (ids_that_could_be_offsets, "other target ids than t2d marks"),
        (ids_that_nothing_contradicts, "as absolute ids do"),
        (nested_only([1, 3, 4]), r"whose output it is, \[2, 4, 5\], else \[1, 3, 4\]"),
        (set_config(eagle_aux_hidden_state_layer_ids=[2, 5, 4]), "not ascending"),
        (set_config(eagle_aux_hidden_state_layer_ids=[2, 4, 9]), "within the target's 8 layers"),
        (set_config(eagle_aux_hidden_state_layer_ids=[2, 4]), "of the 2 aux layers"),
        (set_config(speculators_model_type="dflash"), "other kinds of drafters"),
    ],
)
def test_a_certain_misreading_is_refused(
    made: Path, target: TargetConfig, tmp_path: Path, change: Change, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        head.check(changed(made, tmp_path / "head", change), target)


def masked(config: Config, weights: Weights) -> None:
    weights["mask_hidden"] = torch.ones(1, 3 * config["hidden_size"])


def test_a_p_eagle_head_is_drafted_with_in_parallel(
    made: Path, target: TargetConfig, tmp_path: Path
) -> None:
    """AutoModel's and speculators' name for the token, and no other sign than the tensor."""

    def change(config: Config, weights: Weights) -> None:
        masked(config, weights)
        config["mask_token_id"] = 0

    folder = changed(made, tmp_path / "head", change)
    assert head.check(folder, target) == []
    assert head.needed_settings(folder) == {"parallel_drafting": True}
    assert head.needed_settings(made / "whole") == {}
    with pytest.raises(UserError, match="must name the mask token beside it"):
        head.check(changed(made, tmp_path / "tokenless", masked), target)
    with pytest.raises(UserError, match="mask_token_id"):
        read_head(changed(made, tmp_path / "wordy", set_config(mask_token_id="a word")))


@pytest.mark.parametrize("kind", [["eagle3"], {}, 3])
def test_a_kind_that_is_no_word_is_refused(made: Path, tmp_path: Path, kind: Any) -> None:
    layer: Config = {"speculators_model_type": "eagle3"}
    for name, settings in (
        ("head", {"speculators_model_type": kind}),
        ("layer", layer | {"transformer_layer_config": {"model_type": kind}}),
    ):
        with pytest.raises(UserError, match=r"found .*model_type") as refused:
            read_head(changed(made, tmp_path / name, set_config(**settings)))
        assert refused.value.code == "head-not-eagle3" and repr(kind) in str(refused.value)


def test_numbers_that_are_none_are_refused(made: Path, tmp_path: Path) -> None:
    head.check_numbers(made / "whole")

    def change(config: Config, weights: Weights) -> None:
        weights["fc.weight"][0, 0] = torch.nan

    with pytest.raises(UserError, match=r"fc\.weight: NaN or infinity"):
        head.check_numbers(changed(made, tmp_path / "head", change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (drop("eagle_aux_hidden_state_layer_ids", "eagle_config"), r"vLLM takes \[2, 4, 5\]"),
        (set_config(tie_word_embeddings=True), "tie_word_embeddings is true"),
        (set_config(norm_output=True), "norm_output is true without"),
        (
            set_config(eagle_config={"eagle_aux_hidden_state_layer_ids": [3, 5, 6]}),
            r"are not the top-level \[2, 4, 5\]",
        ),
    ],
)
def test_what_may_be_meant_is_said(
    made: Path, target: TargetConfig, tmp_path: Path, change: Change, told: str
) -> None:
    import re

    (warning,) = head.check(changed(made, tmp_path / "head", change), target)
    assert re.search(told, warning)


def test_nested_ids_that_are_vllms_own_default_pass(
    made: Path, target: TargetConfig, tmp_path: Path
) -> None:
    assert head.check(changed(made, tmp_path / "head", nested_only([2, 4, 5])), target) == []


def test_a_head_without_its_own_lm_head_gets_the_targets(
    made: Path, target: TargetConfig, tmp_path: Path
) -> None:
    (warning,) = head.check(
        changed(made, tmp_path / "head", drop("lm_head.weight"), of="full"), target
    )
    assert "vLLM gives it the target's" in warning


def as_speculators(folder: Path, *, keep_nulls: bool = False, **top: Any) -> None:
    """The layout that the speculators library writes."""
    config = json.loads((folder / "config.json").read_text())
    kept = ("draft_vocab_size", "target_hidden_size", "eagle_aux_hidden_state_layer_ids")
    layer = {k: v for k, v in config.items() if k not in (*kept, "architectures", "eagle_config")}
    layer.pop("norm_before_residual")
    own = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "tiny", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": layer,
        "norm_before_residual": False,
        **{name: config[name] for name in kept},
        **top,
    }
    kept_keys = {k: v for k, v in own.items() if keep_nulls or v is not None}
    (folder / "config.json").write_text(json.dumps(kept_keys))
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


def test_a_null_in_the_speculators_layout_is_no_key_to_vllm(
    made: Path, target: TargetConfig, tmp_path: Path
) -> None:
    """What the speculators library saves; vLLM leaves the null out."""
    folder = changed(made, tmp_path / "head", set_config())
    as_speculators(folder, target_hidden_size=None, keep_nulls=True)
    assert json.loads((folder / "config.json").read_text())["target_hidden_size"] is None
    assert head.check(folder, target) == []


def test_the_speculators_layout(made: Path, target: TargetConfig, tmp_path: Path) -> None:
    folder = changed(made, tmp_path / "head", set_config())
    as_speculators(folder)
    assert read_head(folder).layout == "speculators"
    assert head.check(folder, target) == []
    as_speculators(changed(made, folder, set_config()), norm_before_residual=None)
    assert head.check(folder, target) == [
        "norm_before_residual is not given: in this layout vLLM takes true."
    ]
    parallel = {"speculators_model_type": "peagle", "mask_token_id": 0}
    as_speculators(changed(made, folder, masked), norm_before_residual=None, **parallel)
    assert head.check(folder, target) == [
        "norm_before_residual is not given: in this layout vLLM takes false."
    ]
    as_speculators(changed(made, folder, set_config()), eagle_aux_hidden_state_layer_ids=None)
    (warning,) = head.check(folder, target)
    assert "vLLM takes [2, 4, 5]" in warning


def test_weights_as_pytorch_saves_them(made: Path, target: TargetConfig, tmp_path: Path) -> None:
    folder = changed(made, tmp_path / "head", set_config())
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert head.check(folder, target) == []
    weights["d2t"] = weights["d2t"] + torch.arange(DRAFT)
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="Absolute ids"):
        head.check(folder, target)


@pytest.mark.parametrize("prefix", ["model.", "eagle_module."])
def test_names_with_a_prefix_are_told(
    made: Path, target: TargetConfig, tmp_path: Path, prefix: str
) -> None:
    def renamed(config: Config, weights: Weights) -> None:
        for name in list(weights):
            weights[prefix + name] = weights.pop(name)

    with pytest.raises(UserError, match=rf"found \['{prefix}fc\.weight'\]") as refused:
        head.check(changed(made, tmp_path / "head", renamed), target)
    assert "Rename its tensors" in refused.value.remedy


def test_an_index_says_which_files_are_the_heads(
    made: Path, target: TargetConfig, tmp_path: Path
) -> None:
    folder = changed(made, tmp_path / "head", set_config())
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "a.safetensors", {"format": "pt"})
    older = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    save_file(older, folder / "b.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert head.check(folder, target) == []
    assert torch.equal(read_head(folder).tensors()["fc.weight"], weights["fc.weight"])
    (folder / "a.safetensors").unlink()
    with pytest.raises(UserError, match=r"a\.safetensors, found none"):
        head.check(folder, target)


def test_pickles_of_another_name(made: Path, target: TargetConfig, tmp_path: Path) -> None:
    """vLLM loads any `.bin` but those that a trainer leaves."""
    folder = changed(made, tmp_path / "head", set_config())
    torch.save(load_file(folder / "model.safetensors"), folder / "model.bin")
    (folder / "model.safetensors").unlink()
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    assert head.check(folder, target) == []


def test_damaged_folders(made: Path, target: TargetConfig, tmp_path: Path) -> None:
    folder = changed(made, tmp_path / "head", set_config())
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="expected a safetensors file"):
        head.check(folder, target)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="found no weights"):
        head.check(folder, target)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        head.check(folder, target)
