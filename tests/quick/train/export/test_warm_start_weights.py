# SPDX-License-Identifier: Apache-2.0
"""A training starts from any layout and vocabulary of a head that train reads; others are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.contracts.layers import to_output_ids
from shared.contracts.vocab import from_token_ids
from shared.errors import UserError
from shared.settings import build
from stages.train.config import TrainConfig
from stages.train.export import warm_start
from stages.train.model import DraftHead
from tests.quick.train.export.warm_starts import AUX, Config, changed, same, start


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


def test_frequencies_beside_the_weights_are_passed_over(place: Path, tmp_path: Path) -> None:
    """As older transformers saved them, and as vLLM passes them over."""
    names = ("midlayer.self_attn.rotary_emb.inv_freq", "layers.0.self_attn.rotary_emb.cos_cached")
    more = {name: torch.ones(16) for name in names}
    head = changed(place, tmp_path / "head", lambda config: None, **more)
    assert same(start(place, head), start(place, "ours"))


def test_a_layer_under_two_names_is_refused(place: Path, tmp_path: Path) -> None:
    more = {"layers.0.mlp.up_proj.weight": torch.ones(256, 128)}
    head = changed(place, tmp_path / "head", lambda config: None, **more)
    with pytest.raises(UserError, match=r"both layers\.0\.mlp\.up_proj\.weight and mid") as refused:
        start(place, head)
    assert refused.value.code == "head-misread"


def test_a_full_vocabulary_without_an_lm_head_gets_the_targets(place: Path, tmp_path: Path) -> None:
    head = changed(
        place, tmp_path / "head", lambda config: None, source="full", **{"lm_head.weight": None}
    )
    assert start(place, head, draft_vocab_size="512").lm_head.weight[1, 1] == 129


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
