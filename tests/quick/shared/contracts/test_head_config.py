# SPDX-License-Identifier: Apache-2.0
"""The head's shape and rope for targets of other families; the oracle is transformers' LlamaConfig.

`tests/engine/train/test_rope.py` compares the rope tables with vLLM's.
"""

import math
from typing import Any

import pytest
from transformers import LlamaConfig

from shared.contracts.exported_head import config_json
from shared.contracts.head_config import HeadConfig
from shared.errors import UserError

TARGET: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 100,
    "max_position_embeddings": 32768,
}


def head_for(**changes: Any) -> HeadConfig:
    raw = {key: value for key, value in (TARGET | changes).items() if value is not None}
    return HeadConfig.from_json(raw, aux_layers=(1, 2, 3), draft_vocab_size=50)


@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads", "head_dim", "expected"),
    [
        (2048, 16, 4, 128, (16, 4, 128)),  # as it is
        (5120, 24, 4, 256, (16, 4, 256)),  # Qwen3.5-27B
        (4096, 96, 8, 128, (64, 8, 128)),  # GLM-4.5
        (2880, 64, 8, 64, (64, 8, 64)),  # gpt-oss: 2880 = 64 * 45
        (640, 4, 1, 256, (4, 1, 256)),
        (900, 7, 7, None, (6, 1, 150)),
        (1536, 12, 2, 512, (12, 2, 256)),  # wider than vLLM's attention takes
    ],
)
def test_attention_heads_are_legal_for_llama(
    hidden: int, heads: int, kv_heads: int, head_dim: int | None, expected: tuple[int, int, int]
) -> None:
    config = head_for(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    found = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert found == expected
    LlamaConfig(**config_json(config, dtype="bfloat16"))  # it checks the shape


PLAIN = [
    {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
    {"rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}},
    {"partial_rotary_factor": 0.75, "rope_scaling": {"rope_type": "longrope"}},
    {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.25}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 1.0}},
    {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}},
    {
        "rope_theta": None,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    },
    {"rope_theta": None, "rotary_emb_base": 1e6},
    {"rope_theta": None, "model_type": "gemma3_text"},  # its class says 1e6, the file nothing
    # A table of vLLM's with fewer rows than the target has positions.
    {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}},
]


@pytest.mark.parametrize("rope", PLAIN, ids=lambda rope: str(rope)[:60])
def test_what_engines_may_read_otherwise_becomes_the_plain_type(rope: dict[str, Any]) -> None:
    config = head_for(**({"rope_theta": 1e6} | rope))
    assert (config.rope_theta, config.rope_scaling) == (1e6, None)


def test_an_alpha_is_a_factor_on_theta() -> None:
    rope = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    config = head_for(rope_theta=1e4, rope_scaling=rope)
    assert config.rope_theta == pytest.approx(1e4 * 1000 ** (128 / 126))
    assert config.rope_scaling is None


def test_yarn_states_what_engines_would_assume() -> None:
    config = head_for(
        rope_parameters={"type": "yarn", "rope_theta": 1e6, "factor": 4, "beta_fast": None},
        max_position_embeddings=32768,
        original_max_position_embeddings=8192,
    )
    assert config.rope_scaling == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": pytest.approx(1 + 0.1 * math.log(4)),
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }


REFUSED = [
    ({"rope_scaling": {"type": "a-new-type"}}, "a-new-type"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no 'low_freq_factor'"),
    ({"rope_scaling": {"type": "linear", "factor": "wide"}}, "wide"),
    ({"rope_scaling": {"type": "linear", "factor": True}}, "factor True"),
    ({"rope_scaling": ["linear"]}, "no dict"),
    ({"rope_theta": math.inf}, "rope_theta inf"),
    ({"hidden_size": 0}, "hidden_size 0"),
    ({"num_attention_heads": None}, "no 'num_attention_heads'"),
]


@pytest.mark.parametrize(("changes", "problem"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_no_head_can_have_is_refused_by_name(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as refused:
        head_for(**changes)
    assert refused.value.code == "head-config"
    assert refused.value.remedy


def test_an_exported_head_is_read_as_it_is() -> None:
    ours = config_json(head_for(rope_theta=1e6), dtype="bfloat16")
    found = HeadConfig.from_json(ours, aux_layers=(1, 2, 3), draft_vocab_size=50)
    assert found == head_for(rope_theta=1e6)
