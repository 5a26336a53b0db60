# SPDX-License-Identifier: Apache-2.0
"""A GGUF file's names and row order against transformers' own: no network, no package."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.demo.real.target import _LAYER_NAMES, _in_halves, _saved_name


def test_every_tensor_of_a_llama_has_its_name() -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=32,
    )
    with torch.device("meta"):
        names = {name for name, _ in LlamaForCausalLM(config).named_parameters()}
    gguf = [f"blk.{layer}.{part}.weight" for layer in (0, 1) for part in _LAYER_NAMES]
    gguf += ["token_embd.weight", "output_norm.weight", "output.weight"]
    assert {_saved_name(name) for name in gguf} == names


@pytest.mark.parametrize(
    ("rows", "heads", "expected"), [("abcd", 1, "acbd"), ("abcdefgh", 2, "acbdegfh")]
)
def test_rows_of_a_head_go_from_pairs_to_halves(rows: str, heads: int, expected: str) -> None:
    values = np.array([[ord(letter)] for letter in rows])
    assert "".join(chr(value) for (value,) in _in_halves(values, heads)) == expected
