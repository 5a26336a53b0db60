# SPDX-License-Identifier: Apache-2.0
"""Capture on the card: pages through the fixed buffers on a side stream, and transformers' states.

vLLM gives the page reader one function, `extract_from_kv_cache`; where vLLM is absent, this file's own
stands in for it.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from stages.dump.backends.stats import measure
from tests.engine.dump.capturing import answers, settings
from tests.models import tiny_llama

pytestmark = pytest.mark.gpu

CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector"
PAGES, LAYERS, PAGE_TOKENS, SIZE = 40, 3, 16, 8


def extract(cache: torch.Tensor, slots: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """States [num_tokens, layers, size] from pages [pages, layers, tokens, size], as vLLM 0.32 has them."""
    return cache[slots // PAGE_TOKENS, :, slots % PAGE_TOKENS][:num_tokens]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if find_spec("vllm") is None:
        parts = CONNECTOR.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules[CONNECTOR], "extract_from_kv_cache", extract, raising=False)
    from stages.dump.backends.vllm import pages

    return pages


def test_rows_come_whole_while_the_engine_goes_on(device: torch.device, pages: ModuleType) -> None:
    """Pages are zeroed and written anew at once, as the engine's next step would."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.zeros(PAGES, LAYERS, PAGE_TOKENS, SIZE, dtype=torch.bfloat16, device=device)
    reader = pages.PageReader(cache, PAGE_TOKENS, chunk_tokens=48)
    taken = []
    for _ in range(12):
        num_tokens = int(torch.randint(1, 300, (1,), generator=generator))
        blocks = torch.randperm(PAGES, generator=generator)[: -(-num_tokens // PAGE_TOKENS)]
        states = torch.randn(num_tokens, LAYERS, SIZE, generator=generator).bfloat16()
        tokens = torch.arange(num_tokens)
        where = blocks[tokens // PAGE_TOKENS], slice(None), tokens % PAGE_TOKENS
        cache[tuple(x.to(device) if torch.is_tensor(x) else x for x in where)] = states.to(device)
        taken.append((reader.take(blocks.tolist(), num_tokens), states))
    assert not cache.any()
    for found, states in taken:
        found.wait()
        assert torch.equal(found.states, states)
        for measured, expected in zip(found.stats, measure(states), strict=True):
            assert torch.equal(measured.cpu(), expected)


@torch.inference_mode()
def test_transformers_states_are_the_cpu_s(device: torch.device, tmp_path: Path) -> None:
    """Apart by bfloat16's rounding, which eight layers carry on."""
    from stages.dump.backends.hf import HfCapture

    target = tiny_llama(tmp_path, max_length_tokens=256)
    given = {**settings(target), "max_num_batched_tokens": 600, "dtype": "bfloat16"}
    found = []
    for kind in ("cpu", device.type):
        with HfCapture(**given, device=kind) as capture:
            found.append(answers(capture)[0])
    expected, on_device = found
    assert expected.keys() == on_device.keys()
    for row, states in expected.items():
        gap = (on_device[row].cpu().float() - states.float()).norm() / states.float().norm()
        assert gap < 2**-5, f"row {row}: {gap:.4f}"
