# SPDX-License-Identifier: Apache-2.0
"""The exported config and tensors: the exact set that engines load, read back as the same head."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from shared.contracts.exported_head import check_export, expected_tensors
from shared.contracts.head_variant import HeadVariant, named_variant
from shared.errors import OutputError
from tests.heads import draft_logits, load_head
from tests.quick.train.export.small_head import CONFIG, export, make_head

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_config_is_the_agreed_list_and_nothing_else(tmp_path: Path) -> None:
    config = export(make_head(), tmp_path / "head", dtype="bfloat16")
    assert config == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "target_hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_theta": 500000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "vocab_size": 30,
        "draft_vocab_size": 12,
        "tie_word_embeddings": False,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
            "use_aux_hidden_state": True,
        },
    }


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["default", "llama3"])
def test_transformers_reads_the_same_rotary_parameters(
    tmp_path: Path, scaling: dict[str, Any] | None
) -> None:
    head = make_head(dataclasses.replace(CONFIG, rope_scaling=scaling))
    raw = export(head, tmp_path / "head")
    config = AutoConfig.from_pretrained(tmp_path / "head")
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert config.rope_parameters == {"rope_type": "default", **(scaling or {})} | {
        "rope_theta": 500000.0
    }
    assert config.head_dim == 8
    assert raw.get("rope_scaling") == scaling  # where transformers 4 looks
    assert load_head(tmp_path / "head", head.embed_tokens).config == head.config


def test_tensors_are_the_exact_set_that_engines_load(tmp_path: Path) -> None:
    export(make_head(), tmp_path / "head", dtype="bfloat16")
    weights = load_file(tmp_path / "head" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        "fc.weight": (16, 48),
        "midlayer.input_layernorm.weight": (16,),
        "midlayer.hidden_norm.weight": (16,),
        "midlayer.post_attention_layernorm.weight": (16,),
        "midlayer.self_attn.q_proj.weight": (32, 32),
        "midlayer.self_attn.k_proj.weight": (16, 32),
        "midlayer.self_attn.v_proj.weight": (16, 32),
        "midlayer.self_attn.o_proj.weight": (16, 32),
        "midlayer.mlp.gate_proj.weight": (24, 16),
        "midlayer.mlp.up_proj.weight": (24, 16),
        "midlayer.mlp.down_proj.weight": (16, 24),
        "norm.weight": (16,),
        "lm_head.weight": (12, 16),
        "d2t": (12,),
        "t2d": (30,),
    }
    assert weights["d2t"].dtype == torch.int64
    assert weights["t2d"].dtype == torch.bool
    assert {t.dtype for name, t in weights.items() if "weight" in name} == {torch.bfloat16}
    assert weights["d2t"].tolist() == list(range(3, 15))
    assert weights["t2d"].nonzero().flatten().tolist() == list(range(3, 27, 2))


def test_a_full_vocabulary_has_no_mapping(tmp_path: Path) -> None:
    head = make_head(dataclasses.replace(CONFIG, draft_vocab_size=30))
    export(head, tmp_path / "head")
    weights = load_file(tmp_path / "head" / "model.safetensors")
    assert weights.keys() == expected_tensors(head.config).keys()
    assert not weights.keys() & {"d2t", "t2d"}
    assert load_head(tmp_path / "head", head.embed_tokens).to_target_ids(torch.tensor(29)) == 29


VARIANTS = {
    "eagle3.1": (named_variant("eagle3.1", None), {"fc_norm": True, "norm_output": True}),
    "qwen3": (
        named_variant("eagle3", "qwen3"),
        {"architectures": ["Eagle3Qwen3ForCausalLM"], "model_type": "qwen3"},
    ),
    "window": (
        named_variant("eagle3", None, 64),
        {"layer_types": ["sliding_attention"], "sliding_window": 64},
    ),
    "qwen3-window": (
        named_variant("eagle3", "qwen3", 64),
        {
            "architectures": ["Eagle3Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "layer_types": ["sliding_attention"],
            "sliding_window": 64,
            "use_sliding_window": True,
        },
    ),
    "p-eagle": (
        named_variant("eagle3", parallel=True),
        {"parallel_drafting": True, "pard_token": 29},
    ),
    "p-eagle-norms": (
        named_variant("eagle3.1", parallel=True),
        {"fc_norm": True, "parallel_drafting": True, "pard_token": 29},
    ),
    "speculators": (
        HeadVariant(norm_before_fc=True, norm_before_residual=True),
        {"norm_before_fc": True, "norm_before_residual": True},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_states_its_flags_and_loads_back(tmp_path: Path, name: str) -> None:
    variant, flags = VARIANTS[name]
    classic = export(make_head(), tmp_path / "classic")
    head = make_head(
        dataclasses.replace(CONFIG, variant=variant, mask_token=29 if variant.parallel else None)
    )
    assert export(head, tmp_path / "head") == classic | flags
    assert load_head(tmp_path / "head", head.embed_tokens).config == head.config
    weights = load_file(tmp_path / "head" / "model.safetensors")
    assert weights.keys() == expected_tensors(head.config).keys()
    assert head.config.num_parameters == sum(p.numel() for p in head.parameters())
    card = (tmp_path / "head" / "README.md").read_text()
    assert f"# {variant.name} draft head" in card
    assert "SGLang" not in card
    config = tmp_path / "head" / "config.json"
    config.write_text(json.dumps(classic))
    if name != "window":  # which has no tensor: without its keys it is a classic head
        with pytest.raises(OutputError, match=r"norm|pard_token"):
            check_export(tmp_path / "head")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_loads_back_as_the_same_head(tmp_path: Path, dtype: str) -> None:
    head = make_head()
    export(head, tmp_path / "head", dtype=dtype)
    loaded = load_head(tmp_path / "head", head.embed_tokens)
    head.to(getattr(torch, dtype))
    assert loaded.config == head.config
    tokens, states = torch.randint(0, 30, (9,)), torch.randn(6, 48)
    expected = draft_logits(head, tokens, states, num_steps=3)
    found = draft_logits(loaded, tokens, states, num_steps=3)
    assert found.dtype == getattr(torch, dtype)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert torch.equal(loaded.to_target_ids(torch.arange(12)), head.to_target_ids(torch.arange(12)))
