# SPDX-License-Identifier: Apache-2.0
"""Heads of tiny targets of many families, from kept answers to vLLM: its loader, and its engine drafting.

For the loader no engine starts: vLLM builds target class and draft model as for serving, without
memory. The engine's states and tokens are held to transformers' own class of the target.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.contracts.head_folder import read_head
from stages.bench.head_check import _ask
from tests import chains, targets
from tests.engine.train.proposer import Trace, observe_in_child

pytestmark = pytest.mark.engine

USUAL = ("granite", "gemma2")
DRAFTING = ("qwen3", "gemma3_text", "phi3", "olmo2")
K = 2


def asked(target: Path, head: Path, model_impl: str, work: Path) -> dict[str, Any]:
    """What vLLM says of the head."""
    question = {
        "target": str(target),
        "trust_remote_code": False,
        "dtype": "float32",
        "max_model_len": 128,
        "engine_args": {"model_impl": model_impl},
        "speculative": {"method": "eagle3", "model": str(head), "num_speculative_tokens": 2},
        "shapes": read_head(head).shapes,
    }
    return _ask(question, work)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in USUAL else pytest.mark.soak)
        for name in targets.SERVED
    ],
)
def test_vllm_takes_the_head_as_the_page_says(name: str, tmp_path: Path) -> None:
    head, target = chains.export(name, tmp_path), tmp_path / chains.TARGET
    how = targets.SERVED[name]
    if how != "auto":
        answer = asked(target, head, "auto", tmp_path)
        assert "without_hooks" in answer or "refusal" in answer
    answer = asked(target, head, how or "transformers", tmp_path)
    if not how:
        assert "refusal" in answer
        return
    assert not answer["refused"]
    assert not answer["unwritten"]
    assert answer["dropped"] == ["t2d"]  # which vLLM does not need
    assert len(answer["aux_layers"]) == answer["num_aux_states"] == 3


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in DRAFTING else pytest.mark.soak)
        for name, how in targets.SERVED.items()
        if how
    ],
)
def test_an_engine_drafts_with_the_head(name: str, tmp_path: Path) -> None:
    head = chains.export(name, tmp_path)
    prompt = torch.randint(10, 400, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    seen = observe_in_child(
        tmp_path / chains.TARGET,
        head=head,
        num_speculative_tokens=K,
        prompts=[prompt],
        max_tokens=8,
        max_model_len=128,
        engine_args={"model_impl": targets.SERVED[name]},
    )
    assert seen.num_drafts >= 8 // (K + 1)
    assert seen.num_draft_tokens == K * seen.num_drafts
    assert all(len(event.drafted) == K for event in seen.traces[0].events)
    assert_as_transformers(
        name, tmp_path / chains.TARGET, read_head(head).aux_layers, seen.traces[0]
    )


def assert_as_transformers(name: str, folder: Path, aux_layers: list[int], trace: Trace) -> None:
    """The states that the head was given, and the greedy answer, are those of transformers' class."""
    with torch.no_grad():
        out = targets.load(name, folder)(
            input_ids=trace.tokens[None, :-1], output_hidden_states=True
        )
    states = torch.cat([out.hidden_states[layer][0] for layer in aux_layers], -1)  # [T, A*H]
    assert (trace.aux_states - states).abs().max() <= 1e-3 * states.abs().max()
    answered = torch.arange(trace.num_prompt_tokens - 1, len(states))
    logits = out.logits[0, answered]  # [answer, V]
    chosen = logits.gather(1, trace.tokens[answered + 1, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() <= 1e-3  # ties may fall either way
