# SPDX-License-Identifier: Apache-2.0
"""Heads of tiny targets of many families, from kept answers to vLLM: its loader, and its engine drafting.

For the loader no engine starts: vLLM builds target class and draft model as for serving, without
memory. The engine's states and tokens are held to transformers' own class of the target.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.contracts.head_folder import read_head
from shared.target.model import TargetConfig, read_config
from stages.bench.head_check import _ask
from stages.ops.chain.hooks import read_hooks
from stages.ops.chain.served import architecture, how_served, needs_gpu
from tests import chains, targets
from tests.engine.train.proposer import Trace, observe_in_child

pytestmark = pytest.mark.engine

USUAL = ("granite", "gemma2")
DRAFTING = ("qwen3", "gemma3_text", "phi3", "olmo2")
# vLLM's linear attention on a CPU takes bfloat16 alone, as `shared/target/precision.py` knows.
IN_BFLOAT16 = ("qwen3_next",)
# Of the largest state: bfloat16's, and that of Apertus's activation, whose factors vLLM keeps in it.
TOLERANCES = {"qwen3_next": 0.05, "apertus": 0.01}
K = 2


def marked(usual: tuple[str, ...]) -> list[Any]:
    """Every family that train takes, most for the soak alone."""
    names = [name for name in targets.FAMILIES if name != "phi"]
    return [pytest.param(n, marks=() if n in usual else pytest.mark.soak) for n in names]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's export, with its workspace around it, made once for both tests."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = chains.export(name, tmp_path_factory.mktemp(name))
        return made[name]

    return of


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


def lacks_torchvision(config: TargetConfig) -> bool:
    is_needed = architecture(config) in read_hooks()["torchvision"]
    return is_needed and importlib.util.find_spec("torchvision") is None


@pytest.mark.parametrize("name", marked(USUAL))
def test_vllm_takes_the_head_as_the_dry_run_says(
    name: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    head = exported(name)
    target = head.parents[1] / chains.TARGET
    config = read_config(target)
    how = how_served(config)
    if how != "auto" or lacks_torchvision(config):
        answer = asked(target, head, "auto", tmp_path)
        assert "without_hooks" in answer or "refusal" in answer
    if lacks_torchvision(config):
        return
    answer = asked(target, head, how or "transformers", tmp_path)
    if not how:
        assert "refusal" in answer
    if "refusal" in answer and (not how or needs_gpu(config, with_head=True)):
        return
    assert not answer["refused"]
    assert not answer["unwritten"]
    assert answer["dropped"] == ["t2d"]  # which vLLM does not need
    assert len(answer["aux_layers"]) == answer["num_aux_states"] == 3


@pytest.mark.parametrize("name", marked(DRAFTING))
def test_an_engine_drafts_with_the_head_or_fails_as_the_dry_run_says(
    name: str, exported: Callable[[str], Path]
) -> None:
    head = exported(name)
    target = head.parents[1] / chains.TARGET
    config = read_config(target)
    how = how_served(config)
    prompt = torch.randint(10, 400, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    settings: dict[str, Any] = {
        "head": head,
        "num_speculative_tokens": K,
        "prompts": [prompt],
        "max_tokens": 8,
        "max_model_len": 128,
        "engine_args": {
            "model_impl": how or "transformers",
            "dtype": "bfloat16" if name in IN_BFLOAT16 else "float32",
        },
    }
    if not how or needs_gpu(config, with_head=True) or lacks_torchvision(config):
        with pytest.raises((RuntimeError, AssertionError), match=r"engine failed|not the states"):
            assert_as_transformers(name, head, observe_in_child(target, **settings).traces[0])
        return
    seen = observe_in_child(target, **settings)
    assert seen.num_drafts >= 8 // (K + 1)
    assert seen.num_draft_tokens == K * seen.num_drafts
    assert all(len(event.drafted) == K for event in seen.traces[0].events)
    assert_as_transformers(name, head, seen.traces[0])


def assert_as_transformers(name: str, head: Path, trace: Trace) -> None:
    """The states that the head was given, and the greedy answer, are those of transformers' class."""
    with torch.no_grad():
        out = targets.load(name, head.parents[1] / chains.TARGET)(
            input_ids=trace.tokens[None, :-1], output_hidden_states=True
        )
    layers = read_head(head).aux_layers or ()
    states = torch.cat([out.hidden_states[layer][0] for layer in layers], -1)  # [T, A*H]
    tolerance = TOLERANCES.get(name, 1e-3)
    far = (trace.aux_states - states).abs().amax(1) > tolerance * states.abs().max()  # [T]
    assert not far.any(), f"not the states of transformers at {far.nonzero().flatten().tolist()}"
    answered = torch.arange(trace.num_prompt_tokens - 1, len(states))
    logits = out.logits[0, answered]  # [answer, V]
    chosen = logits.gather(1, trace.tokens[answered + 1, None])[:, 0]
    missed = logits.max(-1).values - chosen  # [answer], ties may fall either way
    assert missed.max() <= tolerance * logits.abs().max()
