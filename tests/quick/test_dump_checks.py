# SPDX-License-Identifier: Apache-2.0
"""Dump's checks: right states pass, each known fault is caught. States from transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared import target as targets
from shared.errors import OutputError
from stages.dump.checks import Agreement, check_sample, logits
from tests.models import tiny_llama

AUX_LAYERS = (2, 4, 5)
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Untied: a random tied target says the same token for ever, and so agrees with any fault.
    return tiny_llama(tmp_path_factory.mktemp("target") / "tiny", tied=False)


@pytest.fixture(scope="module")
def greedy(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [T], loss mask [T], states [T, A+1, H] of a prompt and the target's own greedy answer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(10, 18)[None]
    final: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: final.append(args[0]))
    with torch.no_grad():
        while ids.shape[1] < NUM_TOKENS:
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
        states = model(ids, output_hidden_states=True).hidden_states
    hook.remove()
    mask = (torch.arange(NUM_TOKENS) >= 8).long()
    stacked = torch.stack([states[i][0] for i in AUX_LAYERS] + [final[-1][0]], dim=1)
    return ids[0], mask, stacked.bfloat16()


def share(folder: Path, ids: torch.Tensor, mask: torch.Tensor, states: torch.Tensor) -> float:
    config = targets.read_config(folder)
    agreement = Agreement(config, targets.read_tensors(config))
    agreement.add(ids, mask, states)
    return agreement.share


def test_rebuilt_logits_are_the_models(folder: Path, greedy: tuple[torch.Tensor, ...]) -> None:
    ids, _, states = greedy
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = targets.read_config(folder)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    rebuilt = logits(states[:, -1], config, targets.read_tensors(config))
    assert float((rebuilt - expected).norm() / expected.norm()) < 0.02


def test_right_states_agree(folder: Path, greedy: tuple[torch.Tensor, ...]) -> None:
    ids, mask, states = greedy
    check_sample("a", states, num_tokens=NUM_TOKENS, num_states=4)
    assert share(folder, ids, mask, states) > 0.95


def test_alignment_worked_example(folder: Path) -> None:
    """ids [7, 8, 20, 2], mask [0, 0, 1, 1]: the states at tokens 1 and 2 are asked, no others."""
    config = targets.read_config(folder)
    tensors = targets.read_tensors(config)
    agreement = Agreement(config, tensors)
    states = torch.zeros(4, 4, config.hidden_size)
    states[1, -1], states[2, -1] = (
        tensors.lm_head[token].float() / tensors.norm_weight.float() for token in (20, 2)
    )
    agreement.add(torch.tensor([7, 8, 20, 2]), torch.tensor([0, 0, 1, 1]), states)
    assert (agreement.hits, agreement.asked) == (2, 2)


@pytest.mark.parametrize("fault", ["another layer", "a token late", "another request"])
def test_planted_faults_fail_the_agreement(
    folder: Path, greedy: tuple[torch.Tensor, ...], fault: str
) -> None:
    ids, mask, states = greedy
    planted = {
        "another layer": torch.cat((states[:, :-1], states[:, :1]), dim=1),
        "a token late": states.roll(1, dims=0),
        "another request": states.flip(0),
    }[fault]
    config = targets.read_config(folder)
    agreement = Agreement(config, targets.read_tensors(config))
    agreement.add(ids, mask, planted)
    with pytest.raises(OutputError, match="expected at least 90%"):
        agreement.require(0.9, "shard_00000.pt")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("short", "expected states"),
        ("nan", "NaN"),
        ("zero layer", "all zero"),
        ("constant layer", "same at every token"),
    ],
)
def test_planted_faults_fail_the_sample(
    greedy: tuple[torch.Tensor, ...], fault: str, told: str
) -> None:
    _, _, states = greedy
    planted = states.clone()
    if fault == "short":
        planted = planted[:-1]
    elif fault == "nan":
        planted[3, 1, 5] = torch.nan
    elif fault == "zero layer":
        planted[:, 2] = 0
    else:
        planted[:, 2] = planted[:1, 2]
    with pytest.raises(OutputError, match=told):
        check_sample("a", planted, num_tokens=NUM_TOKENS, num_states=4)
