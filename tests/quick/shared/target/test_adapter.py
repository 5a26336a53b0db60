# SPDX-License-Identifier: Apache-2.0
"""The adapter against transformers: logits from the final state, for families nobody listed in it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import UserError
from shared.target.model import read_config
from shared.target.tensors import read_tensors
from tests import targets

REFUSED = {"phi": "target-head-bias"}
IDS = torch.tensor([[5, 17, 101, 7, 300, 42]])


def final_state_and_logits(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(input of the last norm that runs before lm_head, logits), both [n, ...], by the model."""
    inputs: list[torch.Tensor] = []
    text = model.get_output_embeddings()
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    seen: list[torch.Tensor] = []
    text.register_forward_pre_hook(lambda *_: seen.append(inputs[-1]))
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
    return seen[-1][0], logits[0]


@pytest.mark.parametrize("name", targets.FAMILIES)
def test_logits_are_the_models_own(name: str, tmp_path: Path) -> None:
    model = targets.make(name, tmp_path)
    config = read_config(tmp_path)
    if name in REFUSED:
        with pytest.raises(UserError) as refused:
            read_tensors(config)
        assert refused.value.code == REFUSED[name]
        return
    final, expected = final_state_and_logits(model)
    tensors = read_tensors(config)
    assert expected.std() > 0.1
    assert (tensors.logits(final) - expected).abs().max() < 1e-4
    assert torch.equal(tensors.embed_tokens, model.get_input_embeddings().weight)
