# SPDX-License-Identifier: Apache-2.0
"""A training keeps rope, norms, mask and window of the head it starts from; unfit heads are refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.contracts.head_variant import HeadVariant
from shared.errors import UserError
from shared.settings import build
from stages.train.config import TrainConfig
from stages.train.export.hf import export_head
from tests.quick.train.export.warm_starts import AUX, Config, changed, same, start


def test_a_head_keeps_its_own_rope_and_eps(place: Path, tmp_path: Path) -> None:
    def other(config: Config) -> None:
        config.update(rope_theta=5e5, rms_norm_eps=1e-5, max_position_embeddings=128)
        config["rope_parameters"]["rope_theta"] = 5e5

    kept = start(place, changed(place, tmp_path / "head", other)).config
    assert (kept.rope_theta, kept.rms_norm_eps, kept.max_position_embeddings) == (5e5, 1e-5, 128)


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}
DEEPSEEK = {**YARN, "rope_type": "deepseek_yarn"}
LONG = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}


def rope(config: Config, stated: dict[str, Any]) -> None:
    """As transformers 5 writes it; a `rope_scaling` is the older spelling."""
    if "rope_scaling" in stated:
        del config["rope_parameters"]
    config.update(stated)


@pytest.mark.parametrize(
    ("stated", "reported"),
    [
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor': 0.5"),
        ({"rotary_pct": 0.25}, "'rotary_pct': 0.25"),
        ({"rope_parameters": {"rope_type": "default", "rope_dim": 8}}, "'rope_dim': 8"),
        ({"rope_parameters": {**YARN, "factor": 1.5}}, "'factor': 1.5"),
        ({"rope_parameters": {**YARN, "factor": 1.0, "attention_factor": 2.0}}, "'factor': 1.0"),
        ({"rope_scaling": {"type": "longrope", **LONG}}, "'type': 'longrope'"),
        ({"rope_scaling": {"type": "su", **LONG}}, "'type': 'su'"),
        ({"rope_scaling": {"type": "ntk", "factor": 4.0}}, "'type': 'ntk'"),
        ({"rope_scaling": {**DEEPSEEK, "mscale": 0.7}}, "'mscale': 0.7"),
        ({"rope_theta": None, "rope_scaling": {"type": "mrope"}, "rope_base": 1e6}, "'rope_base'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}, "'mrope_section'"),
        ({"rope_scaling": {**YARN, "mrope_section": [4, 6, 6]}}, "'mrope_section'"),
        ({"rope_scaling": {"rope_type": "default", "alpha": 1000.0}}, "'alpha': 1000.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "'full_attention'"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_rope_that_train_does_not_make_is_refused(
    place: Path, tmp_path: Path, stated: dict[str, Any], reported: str
) -> None:
    head = changed(place, tmp_path / "head", lambda config: rope(config, stated))
    with pytest.raises(UserError, match=rf"rotary embedding .* found .*{reported}") as refused:
        start(place, head)
    assert refused.value.code == "warm-start-unfit"


@pytest.mark.parametrize(
    "stated",
    [
        {"partial_rotary_factor": 1.0, "rope_scaling": None},
        {"rope_parameters": YARN},
        {"rope_parameters": {**YARN, "factor": 1.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_scaling": {"type": "mrope"}},
        {"rope_scaling": {**DEEPSEEK, "mscale": 0.7, "mscale_all_dim": 1.0}},
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_rope_that_train_makes_is_kept(
    place: Path, tmp_path: Path, stated: dict[str, Any]
) -> None:
    start(place, changed(place, tmp_path / "head", lambda config: rope(config, stated)))


@pytest.mark.parametrize(
    ("stated", "advised"),
    [
        ({"rope_parameters": {**YARN, "factor": 1.5}}, "max_position_embeddings .* to 1536"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}, "Without mrope_section"),
    ],
    ids=["yarn", "mrope"],
)
def test_the_refusal_of_a_rope_says_what_to_do(
    place: Path, tmp_path: Path, stated: dict[str, Any], advised: str
) -> None:
    head = changed(place, tmp_path / "head", lambda config: rope(config, stated))
    with pytest.raises(UserError) as refused:
        start(place, head)
    assert re.search(advised, refused.value.remedy)


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (lambda c: c.update(fc_norm=True), "fc_norm.0.weight: None"),
        (lambda c: c["eagle_config"].update(norm_before_fc=True), "input_norm.weight: None"),
        (lambda c: c.update(architectures=["Eagle3Qwen3ForCausalLM"]), "self_attn.k_norm.weight"),
        (lambda c: c.update(architectures=["Qwen3ForCausalLM"]), "self_attn.k_norm.weight"),
        (lambda c: c.update(hidden_act="gelu"), "'hidden_act': 'gelu'"),
        (lambda c: c.update(num_hidden_layers=2), "'num_hidden_layers': 2"),
        (lambda c: c.update(logit_scale=0.25), "'logit_scale': 0.25"),
        (lambda c: c.update(logit_scale=0.0), "'logit_scale': 0.0"),
        (lambda c: c.update(is_causal=False), "'is_causal': False"),
        (lambda c: c["eagle_config"].update(use_aux_hidden_state=False), "'use_aux_hidden_state'"),
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


def test_what_engines_pass_over_is_no_other_kind(place: Path, tmp_path: Path) -> None:
    def change(config: Config) -> None:
        config.update(logit_scale=1, use_aux_hidden_state=False, attention_bias=None)
        config.pop("mlp_bias", None)
        config["eagle_config"].update(mlp_bias=True)

    start(place, changed(place, tmp_path / "head", change))


@pytest.mark.parametrize("nested", [[0, 2, 4], None, []])
def test_aux_layers_may_count_otherwise_only_where_eagle_config_names_them(
    place: Path, tmp_path: Path, nested: list[int] | None
) -> None:
    """The run's are [1, 3, 5]: layers 0, 2 and 4 in the numbering that counts outputs."""

    def change(config: Config) -> None:
        del config["eagle_aux_hidden_state_layer_ids"]
        config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = nested

    name = changed(place, tmp_path / "head", change)
    start(place, name, default=AUX)
    if nested:
        start(place, name, default=(0, 2, 4))
        return
    with pytest.raises(UserError, match=r"aux layers \[0, 2, 4\], and dump captured \[1, 3, 5\]"):
        start(place, name, default=(0, 2, 4))


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
        start(place, name, ttt_steps="4")


def test_a_window_must_show_the_whole_chain() -> None:
    flags = {"target": "t", "draft_window": "16", "ttt_steps": "16"}
    with pytest.raises(UserError, match="draft_window must be above"):
        build(TrainConfig, flags)
    assert build(TrainConfig, {**flags, "ttt_steps": "15"}).draft_window == 16
