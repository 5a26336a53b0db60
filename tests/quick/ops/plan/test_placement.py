# SPDX-License-Identifier: Apache-2.0
"""How many GPUs of a type hold a target."""

import pytest

from stages.ops.plan.architecture import understand
from stages.ops.plan.placement import dump_backend
from stages.ops.tables import read_data
from tests.quick.ops.plan.well_known import config_of, plan_of


@pytest.mark.parametrize(
    ("name", "gpu", "stages"),
    [
        ("llama-3.1-8b-instruct", "H100", (1, 1, 8)),
        ("llama-3.1-8b-instruct", "L4", (1, 1, 8)),
        ("mixtral-8x7b-instruct-v0.1", "H100", (2, 1, 4)),
        ("deepseek-v3", "H200", (8, 1, 1)),
        ("deepseek-v3", "H100", (8, 2, 0)),
        ("kimi-k2-instruct", "H100", (8, 3, 0)),
        ("gemma-3-27b-it", "L40S", (2, 1, 4)),
    ],
)
def test_how_many_gpus_hold_it(name: str, gpu: str, stages: tuple[int, int, int]) -> None:
    """(tensor parallel, pipeline parallel, copies a node): weights fill at most three quarters."""
    plan = plan_of(name)
    found = plan.placements[gpu]
    assert (found.tensor_parallel, found.pipeline_parallel, found.copies) == stages
    assert plan.weights.bytes
    share = plan.weights.bytes / (found.tensor_parallel * found.pipeline_parallel)
    assert share <= 0.75 * read_data("gpus.yaml")[gpu]["memory_gib"] * 2**30


@pytest.mark.parametrize(
    ("name", "backend"),
    # Of the latter vLLM computes keys and values.
    [("DeepseekV3ForCausalLM", "hf"), ("MiniCPM3ForCausalLM", "vllm")],
)
def test_latent_attention_is_captured_with_transformers(name: str, backend: str) -> None:
    raw = {**config_of("llama-3.2-1b-instruct"), "architectures": [name], "kv_lora_rank": 256}
    assert dump_backend(understand(raw, "m"))[0] == backend
