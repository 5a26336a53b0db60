# SPDX-License-Identifier: Apache-2.0
"""Heads of tiny targets of many families, from kept answers to vLLM, which drafts with them.

The states that vLLM hands to the head are held to transformers', layer by layer. Where vLLM's own
class has no hooks, its wrapper around transformers' class (`model_impl: transformers`) has them.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import chains, targets
from tests.engine.train.proposer import observe_in_child

pytestmark = pytest.mark.engine

TOLERANCE = 2e-3  # of the largest state
USUAL = ("granite", "gemma2")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in USUAL else pytest.mark.soak)
        for name in targets.SERVED
    ],
)
def test_vllm_loads_the_head_and_drafts(name: str, tmp_path: Path) -> None:
    head = chains.export(name, tmp_path)
    prompt = torch.randint(10, 400, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    observed = observe_in_child(
        tmp_path / chains.TARGET,
        head=head,
        num_speculative_tokens=2,
        prompts=[prompt],
        max_tokens=8,
        max_model_len=128,
        engine_args={"model_impl": targets.SERVED[name]},
    )
    assert observed.num_drafts > 0
    (trace,) = observed.traces
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / chains.TARGET, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        states = model.eval()(trace.tokens[None, :-1], output_hidden_states=True).hidden_states
    aux_layers = json.loads((head / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"]
    expected = torch.cat([states[layer][0] for layer in aux_layers], dim=-1)
    worst = (trace.aux_states.float() - expected).abs().max() / expected.abs().max()
    assert worst < TOLERANCE
