# SPDX-License-Identifier: Apache-2.0
"""A training starts from any layout of a head that train makes; every other is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.config import build
from shared.contracts.head_variant import HeadVariant
from shared.contracts.layers import to_output_ids
from shared.contracts.vocab import from_token_ids
from shared.errors import UserError
from stages.train.config import TrainConfig
from stages.train.export import warm_start
from stages.train.export.hf import export_head
from stages.train.model import DraftHead
from tests.heads import write_random_head
from tests.models import tiny_llama

AUX, DEFAULT = (1, 3, 5), (2, 4, 5)
Config = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    target = tiny_llama(folder / "tiny")
    write_random_head(folder / "ours", target=target, draft_vocab_size=128, aux_layers=AUX)
    write_random_head(folder / "full", target=target, aux_layers=AUX)
    head = start(folder, "ours")
    names = ["LlamaForCausalLM"]
    export_head(
        head,
        folder / "theirs",
        target="t",
        target_architectures=names,
        provenance={},
        dtype="float32",
    )
    return folder


def start(place: Path, name: str, **flags: str) -> DraftHead:
    settings = {"target": "tiny", "workspace": str(place), "draft_vocab_size": "128", **flags}
    config = build(TrainConfig, {**settings, "init_from": name})
    assert warm_start.fingerprint(config)["init_from"]
    lm_head = torch.arange(512 * 128).reshape(512, 128).float()
    return warm_start.load(config, torch.zeros(512, 128), lm_head, AUX, DEFAULT)


def changed(
    place: Path,
    folder: Path,
    change: Callable[[Config], None],
    *,
    source: str = "ours",
    **more: Any,
) -> str:
    """A copy of a head with another config and further tensors; None leaves one out."""
    config = json.loads((place / source / "config.json").read_text())
    weights = {**load_file(place / source / "model.safetensors"), **more}
    change(config)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def same(left: DraftHead, right: DraftHead) -> bool:
    theirs = right.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in left.state_dict().items())


def test_our_own_speculators_export(place: Path) -> None:
    assert same(start(place, "theirs"), start(place, "ours"))


def test_a_modelopt_head(place: Path, tmp_path: Path) -> None:
    """`layers.0` names, no t2d, the aux layers in eagle_config alone and in the other numbering."""
    weights = load_file(place / "ours" / "model.safetensors")
    layer = {
        name.replace("midlayer.", "layers.0."): tensor
        for name, tensor in weights.items()
        if name.startswith("midlayer.")
    }
    without = dict.fromkeys((name for name in weights if name.startswith("midlayer.")), None)

    def modelopt(config: Config) -> None:
        del config["eagle_aux_hidden_state_layer_ids"]
        config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = to_output_ids(AUX)

    head = changed(place, tmp_path / "head", modelopt, **layer, **without, t2d=None)
    assert same(start(place, head), start(place, "ours"))


def test_a_head_in_a_pickle(place: Path, tmp_path: Path) -> None:
    head = changed(place, tmp_path / "head", lambda config: None)
    weights = load_file(tmp_path / "head" / "model.safetensors")
    (tmp_path / "head" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "head" / "pytorch_model.bin")
    assert same(start(place, head), start(place, "ours"))


def test_a_full_vocabulary_without_an_lm_head_gets_the_targets(place: Path, tmp_path: Path) -> None:
    head = changed(
        place, tmp_path / "head", lambda config: None, source="full", **{"lm_head.weight": None}
    )
    assert start(place, head, draft_vocab_size="512").lm_head.weight[1, 1] == 129


def test_a_head_keeps_its_own_rope_and_eps(place: Path, tmp_path: Path) -> None:
    def other(config: Config) -> None:
        config.update(rope_theta=5e5, rms_norm_eps=1e-5, max_position_embeddings=128)
        config["rope_parameters"]["rope_theta"] = 5e5

    kept = start(place, changed(place, tmp_path / "head", other)).config
    assert (kept.rope_theta, kept.rms_norm_eps, kept.max_position_embeddings) == (5e5, 1e-5, 128)


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (lambda c: c.update(fc_norm=True), "fc_norm.0.weight: None"),
        (lambda c: c["eagle_config"].update(norm_before_fc=True), "input_norm.weight: None"),
        (lambda c: c.update(architectures=["Eagle3Qwen3ForCausalLM"]), "self_attn.k_norm.weight"),
        (lambda c: c.update(architectures=["Qwen3ForCausalLM"]), "self_attn.k_norm.weight"),
        (lambda c: c.update(hidden_act="gelu"), "'hidden_act': 'gelu'"),
        (lambda c: c.update(num_hidden_layers=2), "'num_hidden_layers': 2"),
        (lambda c: c.update(eagle_aux_hidden_state_layer_ids=[2, 4, 5]), r"aux layers \[2, 4, 5\]"),
        (lambda c: c.update(vocab_size=600), "'vocabulary': 600"),
        (lambda c: c.update(intermediate_size=64), "mlp.down_proj.weight"),
    ],
)
def test_another_kind_of_head_is_refused(
    place: Path, tmp_path: Path, change: Callable[[Config], None], reported: str
) -> None:
    with pytest.raises(UserError, match=reported) as refused:
        start(place, changed(place, tmp_path / "head", change))
    assert refused.value.code == "warm-start-unfit"


def test_a_head_keeps_its_own_norms(place: Path, tmp_path: Path) -> None:
    def newer(config: Config) -> None:
        config.update(fc_norm=True, norm_output=True, norm_before_residual=True)

    norms = {f"fc_norm.{i}.weight": torch.full((128,), 1.0 + i) for i in range(3)}
    name = changed(place, tmp_path / "head", newer, **norms)
    head = start(place, name)
    expected = HeadVariant(fc_norm=True, norm_output=True, norm_before_residual=True)
    assert head.config.variant == expected
    assert head.fc_norm[2].weight.tolist() == [3.0] * 128
    assert start(place, name, variant="eagle3.1").config.variant == expected
    for flags in ({"variant": "eagle3"}, {"layer": "qwen3"}, {"draft_window": "64"}):
        with pytest.raises(UserError, match=r"train\.variant") as refused:
            start(place, name, **flags)
        assert refused.value.code == "warm-start-unfit"
    export_head(
        head,
        tmp_path / "theirs",
        target="t",
        target_architectures=[],
        provenance={},
        dtype="float32",
    )
    again = start(place, str(tmp_path / "theirs"))
    assert again.config.variant == expected
    assert same(again, head)


def test_a_p_eagle_head_keeps_its_mask(place: Path, tmp_path: Path) -> None:
    def parallel(config: Config) -> None:
        config.update(fc_norm=True, pard_token=7)

    norms = {f"fc_norm.{i}.weight": torch.full((128,), 1.0 + i) for i in range(3)}
    mask = torch.arange(3 * 128).float().view(1, 1, -1)  # as speculators writes it
    name = changed(place, tmp_path / "head", parallel, **norms, mask_hidden=mask)
    head = start(place, name)
    assert head.config.variant == HeadVariant(fc_norm=True, parallel=True)
    assert head.config.mask_token == 7
    assert torch.equal(head.mask_hidden, mask[0])
    for flags in ({}, {"parallel_drafting": "true"}):
        assert same(start(place, name, variant="eagle3.1", **flags), head)
    for name_of, flags in ((name, {"parallel_drafting": "false"}), (name, {"ttt_steps": "1"})):
        with pytest.raises(UserError, match="parallel") as refused:
            start(place, name_of, **flags)
        assert refused.value.code == "warm-start-unfit"
    with pytest.raises(UserError, match=r"train\.parallel_drafting True"):
        start(place, "ours", parallel_drafting="true")
    for names in (None, []):  # our layout and speculators'
        out = tmp_path / ("ours" if names is None else "theirs")
        export_head(
            head, out, target="t", target_architectures=names, provenance={}, dtype="float32"
        )
        again = start(place, str(out))
        assert again.config == head.config
        assert same(again, head)


@pytest.mark.parametrize(
    ("change", "tensors", "reported"),
    [
        (lambda c: c.update(parallel_drafting=True), {}, "no tensor mask_hidden"),
        (lambda c: None, {"mask_hidden": torch.ones(1, 384)}, "found None"),
        (lambda c: c.update(pard_token=512), {"mask_hidden": torch.ones(1, 384)}, "found 512"),
    ],
)
def test_half_a_mask_is_refused(
    place: Path,
    tmp_path: Path,
    change: Callable[[Config], None],
    tensors: dict[str, torch.Tensor],
    reported: str,
) -> None:
    with pytest.raises(UserError, match=reported) as refused:
        start(place, changed(place, tmp_path / "head", change, **tensors))
    assert refused.value.code == "head-misread"


def test_parallel_drafting_needs_a_second_step() -> None:
    flags = {"target": "t", "parallel_drafting": "true", "ttt_steps": "1"}
    with pytest.raises(UserError, match="parallel_drafting needs ttt_steps above 1"):
        build(TrainConfig, flags)


def test_a_head_keeps_its_own_window(place: Path, tmp_path: Path) -> None:
    def narrow(config: Config) -> None:
        config.update(layer_types=["sliding_attention"], sliding_window=4)

    name = changed(place, tmp_path / "head", narrow)
    assert start(place, name, ttt_steps="3").config.variant == HeadVariant(window=4)
    with pytest.raises(UserError, match="window of 4 positions is not above 4 steps"):
        start(place, name)


def test_a_window_must_show_the_whole_chain() -> None:
    flags = {"target": "t", "draft_window": "16", "ttt_steps": "16"}
    with pytest.raises(UserError, match="draft_window must be above"):
        build(TrainConfig, flags)
    assert build(TrainConfig, {**flags, "ttt_steps": "15"}).draft_window == 16


def test_a_vocabulary_in_another_order_drafts_the_same(place: Path, tmp_path: Path) -> None:
    weights = load_file(place / "ours" / "model.safetensors")
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    ids = (weights["d2t"] + torch.arange(128))[order]
    shuffled = {
        "d2t": (ids - torch.arange(128)).int(),
        "lm_head.weight": weights["lm_head.weight"][order],
    }
    head = changed(place, tmp_path / "head", lambda config: None, **shuffled)
    assert same(start(place, head), start(place, "ours"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_vocabulary_that_is_no_offsets_is_refused(
    place: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    d2t = 2 * torch.arange(128)  # as absolute ids they stay below 512
    marks = torch.zeros(512, dtype=torch.bool)
    marks[d2t] = True
    head = changed(place, tmp_path / "head", lambda config: None, d2t=d2t.to(dtype), t2d=marks)
    with pytest.raises(UserError, match="Absolute ids are not offsets") as refused:
        start(place, head)
    assert refused.value.code == "head-misread"


def test_a_head_with_a_nan_is_refused(place: Path, tmp_path: Path) -> None:
    head = changed(
        place,
        tmp_path / "head",
        lambda config: None,
        **{"norm.weight": torch.full((128,), torch.nan)},
    )
    with pytest.raises(UserError, match=r"norm\.weight: NaN or infinity"):
        start(place, head)


def test_a_length_that_the_config_leaves_out_is_llamas(place: Path, tmp_path: Path) -> None:
    head = changed(place, tmp_path / "head", lambda config: config.pop("max_position_embeddings"))
    assert start(place, head).config.max_position_embeddings == 2048


def test_another_size_of_vocabulary_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match=r"'run.draft_vocab_size': 64"):
        start(place, "ours", draft_vocab_size="64")


def test_a_redrawn_vocabulary_keeps_the_rows_of_common_tokens(place: Path) -> None:
    warm = start(place, "ours")
    own = warm.token_ids()
    config = build(
        TrainConfig, {"target": "tiny", "init_from": "ours", "init_vocabulary": "redraw"}
    )
    lacking = torch.tensor([i for i in range(512) if i not in set(own.tolist())])
    counts = torch.zeros(512, dtype=torch.int64)
    counts[lacking[:40]] = 3
    counts[own[100:]] = 1
    ids = warm_start.token_ids(config, own, counts)
    expected = torch.cat((lacking[:40], own[100:], own[:60]))  # of the unseen ones the lower ids
    assert ids.tolist() == sorted(expected.tolist())
    assert torch.equal(
        warm_start.token_ids(build(TrainConfig, {"target": "tiny"}), own, counts), own
    )

    rows = torch.arange(128 * 128).reshape(128, 128).float()
    draft = from_token_ids(ids, 512)
    head = DraftHead(warm.config, embed_tokens=warm.embed_tokens, d2t=draft.d2t, lm_head=rows)
    warm_start.copy_weights(warm, head)
    old = dict(zip(own.tolist(), warm.lm_head.weight, strict=True))
    for token, row, fresh in zip(ids.tolist(), head.lm_head.weight, rows, strict=True):
        assert torch.equal(row, old.get(token, fresh))
    assert torch.equal(head.t2d, draft.t2d)
    theirs = warm.state_dict()
    for name, tensor in head.state_dict().items():
        assert name in ("lm_head.weight", "d2t", "t2d") or torch.equal(tensor, theirs[name])


def test_the_answers_tokens_come_first_then_the_heads_own() -> None:
    """The docstring's example."""
    config = build(TrainConfig, {"target": "t", "init_from": "head", "init_vocabulary": "redraw"})

    counts = torch.tensor([0, 0, 4, 0, 0, 7])
    assert warm_start.token_ids(config, torch.arange(3), counts).tolist() == [0, 2, 5]


def test_no_vocabulary_is_redrawn_without_a_head() -> None:
    with pytest.raises(UserError, match="init_vocabulary redraw needs init_from"):
        build(TrainConfig, {"target": "t", "init_vocabulary": "redraw"})


def test_what_is_no_head_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match="found no weights") as refused:
        (place / "bare").mkdir(exist_ok=True)
        (place / "bare" / "config.json").write_text('{"hidden_size": 8, "vocab_size": 8}')
        start(place, "bare")
    assert refused.value.code == "head-not-eagle3"
