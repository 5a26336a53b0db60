# SPDX-License-Identifier: Apache-2.0
"""Parameters and bytes of a target: its tensors', counted, or unknown."""

from pathlib import Path

import pytest

from shared.errors import UserError
from shared.io.safetensors_files import TensorInfo
from stages.ops.plan import overlay
from stages.ops.plan.architecture import understand
from stages.ops.plan.model import make_plan, warnings
from stages.ops.plan.output import recipe
from tests.quick.ops.plan.well_known import config_of, plan_of, settings

QUANTIZED = {
    "compressed-tensors fp8": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "compressed-tensors w4a16": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8 by channel": {"quant_method": "fp8"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
}


def test_bytes_follow_the_quantisation() -> None:
    # bf16, but the experts' matrices take 4.25 bits a value; as the published checkpoint does.
    assert plan_of("gpt-oss-20b").weights.bytes == pytest.approx(13.76e9, rel=0.01)
    # One byte a value of each matrix, and a scale for 128 x 128 of them.
    assert plan_of("deepseek-v3").weights.bytes == pytest.approx(673e9, rel=0.01)
    assert plan_of("llama-3.1-8b-instruct").weights.bytes == 2 * 8_030_261_248


@pytest.mark.parametrize("how", QUANTIZED)
def test_a_size_that_config_json_does_not_say_is_unknown(how: str) -> None:
    """No number is better than a wrong one: the parameters are known, the bytes are not."""
    raw = {**config_of("llama-3.1-8b-instruct"), "quantization_config": QUANTIZED[how]}
    plan = make_plan("m", understand(raw, "m"))
    assert plan.weights.parameters == 8_030_261_248
    assert plan.weights.bytes is None
    assert not plan.placements
    assert any("size is unknown" in text for text in warnings(plan))
    assert "tensor_parallel_size" not in recipe(plan, settings())
    with pytest.raises(UserError, match="weights is unknown"):
        overlay.texts(plan, settings(), Path("overlay"))


@pytest.mark.parametrize("how", QUANTIZED)
def test_a_quantised_size_is_that_of_its_tensors(how: str) -> None:
    raw = {**config_of("llama-3.1-8b-instruct"), "quantization_config": QUANTIZED[how]}
    tensors: dict[str, TensorInfo] = {
        "model.embed_tokens.weight": {"dtype": "BF16", "shape": [10, 4]},
        "model.layers.0.q.weight": {"dtype": "F8_E4M3", "shape": [4, 4]},
        "model.layers.0.k.weight": {"dtype": "F4", "shape": [4, 4]},
        "model.layers.0.v.weight_packed": {"dtype": "I32", "shape": [4, 2]},
    }
    plan = make_plan("m", understand(raw, "m"), tensors)
    assert plan.weights.bytes == 80 + 16 + 8 + 32
    assert plan.weights.parameters == 8_030_261_248
    assert plan.weights.source == "safetensors headers"


def test_an_architecture_without_a_class_has_no_size() -> None:
    raw = {
        **config_of("llama-3.1-8b-instruct"),
        "model_type": "x",
        "architectures": ["XForCausalLM"],
    }
    plan = make_plan("m", understand(raw, "m"))
    assert (plan.weights.parameters, plan.weights.bytes) == (None, None)
    assert any("no class for the model_type 'x'" in text for text in warnings(plan))
