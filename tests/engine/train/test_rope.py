# SPDX-License-Identifier: Apache-2.0
"""The head's rope tables equal those that vLLM builds from the exported config.json.

Every rope type of transformers and spellings of the hub, over 40,000 positions, beyond the original
length too. A head that a training starts from is held to the table that vLLM builds from its own config.json.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shared.contracts.exported_head import config_json
from shared.contracts.head_config import HeadConfig
from shared.contracts.rope import not_kept
from stages.train.kernels.rotary import Rotary

pytestmark = pytest.mark.engine

POSITIONS, HEAD_DIM = 40_000, 64
TARGET: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "vocab_size": 100,
    "max_position_embeddings": POSITIONS,
    "rope_theta": 1e6,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 10.0, "original_max_position_embeddings": 4000}
LONG = {"short_factor": [1.0] * 32, "long_factor": [4.0] * 32}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "linear-power-of-two": {"rope_parameters": {"rope_type": "linear", "factor": 8}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "dynamic-alpha": {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "yarn": {"rope_scaling": {"type": "yarn", **YARN}},
    "yarn-mscale": {"rope_scaling": {"type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.0}},
    "yarn-truncate": {"rope_parameters": {"rope_type": "yarn", **YARN, "truncate": False}},
    "yarn-betas": {"rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2}},
    "yarn-attention": {"rope_scaling": {"rope_type": "yarn", **YARN, "attention_factor": 1}},
    "yarn-no-factor": {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4096}},
    "deepseek_yarn": {"rope_scaling": {"type": "deepseek_yarn", **YARN}},
    "telechat3-yarn": {"rope_scaling": {"type": "telechat3-yarn", **YARN}},
    "yarn-mrope": {"rope_scaling": {"type": "yarn", **YARN, "mrope_section": [8, 12, 12]}},
    "llama3": {
        "rope_scaling": {"type": "llama3", **LLAMA3, "original_max_position_embeddings": 8192}
    },
    "longrope": {"rope_scaling": {"type": "longrope", **LONG}},
    "su": {"rope_scaling": {"type": "su", **LONG}, "original_max_position_embeddings": 4096},
    "proportional": {
        "rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    },
    "partial": {"partial_rotary_factor": 0.25},
    "mrope": {"rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}},
    "per-layer-type": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        }
    },
}


# What a head may state, beside the spellings of a target.
OF_HEADS: dict[str, dict[str, Any]] = {
    "half": {"partial_rotary_factor": 0.5},
    "width": {"rotary_pct": 0.5},
    "rope_dim": {"rope_parameters": {"rope_dim": 32, "rope_theta": 1e6}},
    "ntk": {"rope_scaling": {"type": "ntk", "factor": 2.0}},
    "dynamic-trained": {
        "rope_scaling": {"type": "dynamic", "factor": 4.0, "max_trained_positions": 8000}
    },
    "alpha-alone": {"rope_scaling": {"rope_type": "default", "alpha": 1000.0}},
    "yarn-short": {"rope_scaling": {"type": "yarn", **YARN, "factor": 4.0}},
    "yarn-by-one": {"rope_scaling": {"type": "yarn", **YARN, "factor": 1.0}},
    "yarn-softmax": {
        "rope_scaling": {"type": "yarn", **YARN, "factor": 1.0, "attention_factor": 2.0}
    },
    "yarn-beside": {
        "rope_scaling": {"type": "yarn", "factor": 10.0},
        "original_max_position_embeddings": 5000,
    },
    "deepseek-mscale": {"rope_scaling": {"type": "deepseek_yarn", **YARN, "mscale": 0.7}},
    "deepseek-mscales": {
        "rope_scaling": {"type": "deepseek_yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.0}
    },
    "deepseek-attention": {
        "rope_scaling": {"type": "deepseek_yarn", **YARN, "attention_factor": 1}
    },
    "other-theta": {"rope_theta": None, "rope_base": 1e6},
    "two-thetas": {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
    "no-theta": {"rope_theta": None},
}
# vLLM builds no table of these without a server's settings, or none at all.
NOT_BUILT = ("longrope", "su", "per-layer-type", "yarn-no-factor", "linear-power-of-two")
# The same table, read otherwise where an image is.
ONLY_IN_TEXTS = ("mrope",)


@pytest.fixture(scope="module", autouse=True)
def engine_config() -> Iterator[None]:
    """vLLM's layers are built under a config."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def test_every_rope_type_of_transformers_is_a_case() -> None:
    assert ROPE_INIT_FUNCTIONS.keys() <= CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_the_table_is_vllms(name: str) -> None:
    from vllm.model_executor.layers.rotary_embedding import get_rope

    head = HeadConfig.from_json(TARGET | CASES[name], aux_layers=(1, 2, 3), draft_vocab_size=100)
    served = LlamaConfig(**config_json(head, dtype="bfloat16"))
    table = get_rope(
        head.head_dim,
        max_position=served.max_position_embeddings,
        rope_parameters=served.rope_parameters,
        dtype=torch.float32,
    ).cos_sin_cache
    assert len(table) >= POSITIONS
    cos, sin = Rotary(head).table(torch.arange(POSITIONS), torch.float32)
    half = HEAD_DIM // 2
    ours = torch.cat((cos[:, 0, :half], sin[:, 0, :half]), dim=1)
    torch.testing.assert_close(ours, table[:POSITIONS].float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in CASES | OF_HEADS if name not in NOT_BUILT])
def test_a_warm_start_keeps_the_table_that_vllm_builds(name: str) -> None:
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.transformers_utils.config import patch_rope_parameters

    stated = {
        key: value
        for key, value in (TARGET | (CASES | OF_HEADS)[name]).items()
        if value is not None
    }
    head = HeadConfig.from_json(stated, aux_layers=(1, 2, 3), draft_vocab_size=100)
    changed = not_kept(stated, HEAD_DIM)
    theirs = LlamaConfig(**copy.deepcopy(stated))
    patch_rope_parameters(theirs)
    served = get_rope(
        HEAD_DIM, POSITIONS, rope_parameters=theirs.rope_parameters, dtype=torch.float32
    )
    table = served.cos_sin_cache[:POSITIONS].float()
    cos, sin = Rotary(head).table(torch.arange(len(table)), torch.float32)
    half = HEAD_DIM // 2
    ours = torch.cat((cos[:, 0, :half], sin[:, 0, :half]), dim=1)
    # At position 40,000 a rounding of the frequency is some 1e-3.
    is_same = table.shape == ours.shape and torch.allclose(table, ours, atol=5e-3)
    assert is_same == (not changed or name in ONLY_IN_TEXTS), changed
