# SPDX-License-Identifier: Apache-2.0
"""What the TTT pass and loss come to: the reference's values and gradients, and zero where nothing counts."""

import dataclasses

import pytest
import torch

from shared.contracts.head_variant import HeadVariant
from stages.train.objective.loss import ttt_loss
from tests.quick.train.objective.cases import (
    CONFIG,
    VARIANTS,
    config_of,
    gradients,
    make_case,
    reference_loss,
)


@pytest.mark.parametrize(
    ("changes", "num_steps", "output"),
    [
        pytest.param({}, 3, {}, id="grouped-heads-partial-vocabulary"),
        pytest.param({"num_key_value_heads": 4}, 4, {"logit_scale": 0.7}, id="one-head-each"),
        pytest.param({"num_key_value_heads": 1}, 1, {"softcap": 2.0}, id="one-key-head-softcap"),
        pytest.param(
            {"draft_vocab_size": 9}, 5, {"logit_scale": 3.0, "softcap": 4.0}, id="full-vocabulary"
        ),
    ],
)
def test_values_and_gradients_are_the_reference_s(
    changes: dict[str, int], num_steps: int, output: dict[str, float]
) -> None:
    case = make_case(dataclasses.replace(CONFIG, **changes), seed=num_steps, **output)
    loss, sums = ttt_loss(case.head, case.batch, case.output, num_steps=num_steps, decay=0.8)
    loss.backward()
    options = {"scale": output.get("logit_scale", 1.0), "softcap": output.get("softcap")}
    expected, expected_grads = reference_loss(case, num_steps=num_steps, decay=0.8, **options)

    assert sums.in_vocab_slots.tolist() == expected["in_vocab_slots"]
    assert sums.counted.tolist() == expected["counted"]
    assert sums.hits.tolist() == expected["hits"]
    assert sum(expected["hits"]) > 0
    if "draft_vocab_size" not in changes:
        assert sum(expected["in_vocab_slots"]) < sum(expected["counted"]), "no argmax fell outside"
    means = [m.detach().item() for m in expected["means"] if m is not None]
    assert (sums.loss / sums.in_vocab_slots).tolist()[: len(means)] == pytest.approx(
        means, abs=1e-5
    )
    assert loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    assert sums.mean_loss(0.8) == pytest.approx(expected["loss"].item(), abs=1e-5)
    for name, grad in gradients(case.head).items():
        torch.testing.assert_close(grad.double(), expected_grads[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_the_reference_s(name: str) -> None:
    config = config_of(VARIANTS[name])
    case = make_case(config, lengths=(1, 8, 4), answer_share=1.0)
    loss, sums = ttt_loss(case.head, case.batch, case.output, num_steps=3, decay=0.8)
    loss.backward()
    expected, expected_grads = reference_loss(case, num_steps=3, decay=0.8)
    assert sums.in_vocab_slots.tolist() == expected["in_vocab_slots"]
    assert sums.hits.tolist() == expected["hits"]
    assert loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    assert gradients(case.head).keys() == expected_grads.keys()
    for weight, grad in gradients(case.head).items():
        torch.testing.assert_close(grad.double(), expected_grads[weight], atol=1e-5, rtol=1e-5)


def test_a_guess_outside_the_vocabulary_carries_no_loss_and_is_a_miss() -> None:
    """Even where the draft's best is the best of what is left of the target's distribution."""
    case = make_case(lengths=(40, 30), seed=1)
    inside = dataclasses.replace(case.batch, in_vocab=torch.ones(70, dtype=torch.bool))
    outside = dataclasses.replace(case.batch, in_vocab=torch.zeros(70, dtype=torch.bool))
    _, sums = ttt_loss(case.head, inside, case.output, num_steps=2, decay=0.8)
    assert (sums.hits > 0).all()
    assert torch.equal(sums.in_vocab_slots, sums.counted)
    loss, without = ttt_loss(case.head, outside, case.output, num_steps=2, decay=0.8)
    assert loss.item() == 0.0
    assert torch.equal(without.counted, sums.counted)
    assert not without.hits.any()
    assert not without.in_vocab_slots.any()


@pytest.mark.parametrize("variant", [HeadVariant(), VARIANTS["p-eagle"]], ids=lambda v: v.name)
def test_a_batch_in_which_nothing_counts_gives_zero_and_zero_gradients(
    variant: HeadVariant,
) -> None:
    """Every weight has a gradient: DDP waits for that of each."""
    case = make_case(config_of(variant), answer_share=-1.0)
    loss, sums = ttt_loss(case.head, case.batch, case.output, num_steps=3, decay=0.8)
    loss.backward()
    assert loss.item() == 0.0
    assert sums.mean_loss(0.8) == 0.0
    assert torch.stack(sums).sum() == 0
    for name, grad in gradients(case.head).items():
        assert grad is not None and not grad.any(), name
