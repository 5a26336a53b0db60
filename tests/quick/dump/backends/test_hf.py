# SPDX-License-Identifier: Apache-2.0
"""The hf backend on a processor: the states of other families, and that padding reaches no real token."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.target.model import read_config
from shared.target.tensors import read_tensors
from stages.dump.backends.base import Row
from stages.dump.backends.hf import HfCapture
from tests import targets
from tests.models import tiny_llama, tiny_moe, tiny_sliding

AUX_LAYERS = (2, 4, 5)
LENGTHS = (1, 40, 7, 64, 33, 2)


@pytest.mark.parametrize("make", [tiny_llama, tiny_sliding, tiny_moe])
@torch.inference_mode()
def test_a_padded_batch_gives_each_row_s_own_states(make, tmp_path: Path) -> None:
    """In float32, against transformers one row at a time: rounding to bfloat16 is all that differs."""
    target = make(tmp_path, max_length_tokens=64)
    torch.manual_seed(0)
    rows = [torch.randint(3, 500, (length,)) for length in LENGTHS]
    settings = {"target": target, "aux_layers": AUX_LAYERS, "num_layers": 8, "dtype": "float32"}
    with HfCapture(**settings, max_length_tokens=64, max_num_batched_tokens=200) as capture:
        found = {one.row: one.states for one in capture.run([Row(ids.tolist()) for ids in rows])}
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    for index, ids in enumerate(rows):
        told = model(ids[None], output_hidden_states=True).hidden_states
        expected = torch.stack([told[layer][0] for layer in AUX_LAYERS], dim=1)
        gap = (found[index][:, :-1].float() - expected).norm() / expected.norm()
        assert gap < 2**-8, f"row {index} of {len(ids)} tokens: {gap:.4f}"
        normed = model.model.norm(found[index][:, -1].float())
        assert (normed - told[-1][0]).norm() / told[-1].norm() < 2**-8


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "cohere", "mpt", "gpt_neox", "nanochat"])
@torch.inference_mode()
def test_other_families_give_their_final_state(name: str, tmp_path: Path) -> None:
    """Vision targets, other names of layers and norms: the logits from the state are the model's."""
    model = targets.make(name, tmp_path)
    ids = [5, 17, 101, 7, 300, 42]
    layers = {"aux_layers": AUX_LAYERS, "num_layers": targets.NUM_LAYERS}
    settings = {"target": tmp_path, "dtype": "float32", **layers}
    with HfCapture(**settings, max_length_tokens=64, max_num_batched_tokens=64) as capture:
        (one,) = capture.run([Row(ids)])
    rebuilt = read_tensors(read_config(tmp_path)).logits(one.states[:, -1])
    expected = model(input_ids=torch.tensor([ids])).logits[0]
    assert (rebuilt - expected).norm() / expected.norm() < 0.01
