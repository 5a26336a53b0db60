# SPDX-License-Identifier: Apache-2.0
"""The losses against their definitions, by hand and by finite differences."""

import pytest
import torch
from torch import Tensor

from shared.target.tensors import FinalNorm
from stages.train.kernels.fused import LOSSES
from stages.train.objective import cross_entropy
from stages.train.objective.cross_entropy import SlotLosses, to_slots, to_targets
from stages.train.objective.loss import (
    step_weights,
    ttt_loss,
)
from stages.train.objective.target_output import SharesInVocab, TargetOutput
from tests import reference
from tests.quick.train.objective.cases import gradients, make_case, reference_loss


@pytest.mark.parametrize("name", LOSSES[1:])
def test_every_loss_is_the_reference_s(name: str) -> None:
    case = make_case(lengths=(8, 4), answer_share=1.0)
    loss, sums = ttt_loss(case.head, case.batch, case.output, num_steps=2, decay=0.8, loss=name)
    loss.backward()
    expected, expected_grads = reference_loss(case, num_steps=2, decay=0.8, loss=name)
    assert loss.item() == pytest.approx(expected["loss"].item(), abs=1e-5)
    assert sums.mean_loss(0.8) == pytest.approx(expected["loss"].item(), abs=1e-5)
    for weight, grad in gradients(case.head).items():
        torch.testing.assert_close(grad.double(), expected_grads[weight], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "gradient"),
    [
        ("lk", 0.5108, [-0.2, -0.2, 0.4]),
        ("tv", 0.4, [-0.12, -0.12, 0.24]),
        ("lk_hybrid", 0.5636, [-0.1498, -0.1167, 0.2664]),
    ],
)
def test_the_worked_example_of_losses(name: str, value: float, gradient: list[float]) -> None:
    """cross_entropy.py's: p = [0.5, 0.3, 0.2] against q = [0.2, 0.2, 0.6]."""
    p, q = torch.tensor([[0.5, 0.3, 0.2]]).double(), torch.tensor([[0.2, 0.2, 0.6]]).double()
    target = TargetOutput(lambda states: states, torch.eye(3).double())  # type: ignore[arg-type]
    hidden = q.log()[None].requires_grad_()
    ones = torch.ones(1, 1).double()
    loss, losses, _ = SlotLosses.apply(hidden, torch.eye(3).double(), ones, p.log(), target, name)
    loss.backward()
    assert loss.item() == losses.item() == pytest.approx(value, abs=1e-4)
    assert hidden.grad is not None
    torch.testing.assert_close(
        hidden.grad.flatten(), torch.tensor(gradient).double(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("name", "value"), [("tv", 0.44), ("lk", 0.5798), ("cross_entropy", 1.3897)]
)
def test_what_the_target_has_outside_the_vocabulary_is_never_accepted(
    name: str, value: float
) -> None:
    """The example with s = 0.8: a = min(0.4, 0.2) + min(0.24, 0.2) + min(0.16, 0.6) = 0.56."""
    p, q = torch.tensor([[0.5, 0.3, 0.2]]).double(), torch.tensor([[0.2, 0.2, 0.6]]).double()
    target = TargetOutput(lambda states: states, torch.eye(3).double())  # type: ignore[arg-type]
    ones, share = torch.ones(1, 1).double(), torch.tensor([0.8]).double()
    given = (q.log()[None], torch.eye(3).double(), ones, p.log(), target, name, share)
    assert SlotLosses.apply(*given)[0].item() == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_distribution_that_nothing_is_accepted_of_gives_no_nan(name: str) -> None:
    target = TargetOutput(lambda states: states, torch.eye(2))  # type: ignore[arg-type]
    hidden = torch.tensor([[[200.0, 0.0]]]).requires_grad_()
    finals = torch.tensor([[0.0, 200.0]])
    loss, _, _ = SlotLosses.apply(hidden, torch.eye(2), torch.ones(1, 1), finals, target, name)
    loss.backward()
    assert hidden.grad is not None
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()


def test_the_worked_example_of_the_soft_target() -> None:
    """Slots [2, 3, 4]; slot 3 at step 1 is scored against p_5, the third row of finals."""
    torch.manual_seed(0)
    hidden, lm_head, finals = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(3, 4)
    target = TargetOutput(FinalNorm(torch.ones(4), 1e-6), torch.randn(5, 4))
    _, entropy, _ = SlotLosses.apply(hidden, lm_head, torch.ones(2, 3), finals, target)
    p_5 = target.logits(finals[2:3]).softmax(-1)[0]
    log_q = (lm_head @ hidden[1, 1]).log_softmax(-1)
    assert float(entropy[1, 1]) == pytest.approx(-float(p_5 @ log_q), abs=1e-6)


def test_the_worked_example_of_columns_by_target() -> None:
    by_slot = torch.tensor([[1, 2, 3], [4, 5, 6]])
    by_target = to_targets(by_slot)
    assert by_target.tolist() == [[1, 2, 3], [0, 4, 5]]
    assert to_slots(by_target).tolist() == [[1, 2, 3], [4, 5, 0]]


def test_the_worked_example_of_step_weights() -> None:
    weights = step_weights(torch.tensor([4, 2, 0]), 0.5)
    assert weights.tolist() == pytest.approx([1 / 6, 1 / 6, 0.0])


def test_loss_gradients_are_those_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 6)  # two targets a chunk
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    lm_head = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 5, dtype=torch.float64).tril(2)  # no target for row 4 beyond step 0
    weights = weights * (torch.arange(5) + torch.arange(3)[:, None] < 5)
    finals = torch.randn(5, 4, dtype=torch.float64)
    target = TargetOutput(
        FinalNorm(torch.ones(4), 1e-6), torch.randn(6, 4, dtype=torch.float64), 1.3, 5.0
    )

    def loss(*inputs: Tensor) -> Tensor:
        return SlotLosses.apply(*inputs, weights, finals, target)[0] * 1.7

    assert torch.autograd.gradcheck(loss, (hidden, lm_head), fast_mode=True)


def test_the_target_s_share_of_the_draft_vocabulary() -> None:
    """By hand, the worked example, and the same in chunks of any size."""
    torch.manual_seed(0)
    finals, norm, lm_head = torch.randn(11, 8), torch.rand(8) + 0.5, torch.randn(30, 8)
    inside = torch.rand(30) < 0.6
    expected = []
    for y in finals:
        p = torch.softmax(2 * torch.tanh(lm_head @ reference.rms_norm(y, norm, 1e-6) / 2), 0)
        expected.append(float(p[inside].sum()) if inside[p.argmax()] else 0.0)
    assert 0 < expected.count(0.0) < 11
    for rows in (1, 4, 100):
        whole = TargetOutput(FinalNorm(norm, 1e-6), lm_head, softcap=2.0)
        find = SharesInVocab(whole, inside)
        shares = torch.cat([find(part) for part in finals.split(rows)])
        assert shares.tolist() == pytest.approx(expected, abs=1e-3)
    plain = TargetOutput(lambda states: states, torch.eye(3))  # type: ignore[arg-type]
    p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for last, share in ((True, 0.7), (False, 0.0)):
        inside = torch.tensor([last, not last, True])
        assert SharesInVocab(plain, inside)(p).tolist() == pytest.approx([share], abs=1e-3)


def test_the_gradient_of_lm_head_adds_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk is 0.3 % off, since states are rounded; a bfloat16 sum of 267 chunks was 1.7 %."""
    torch.manual_seed(0)
    rows, vocabulary, size = 8000, 512, 32
    target = TargetOutput(FinalNorm(torch.ones(size), 1e-6), torch.randn(vocabulary, size) / 2)
    hidden, finals = torch.randn(1, rows, size), torch.randn(rows, size)
    weights = torch.full((1, rows), 1 / rows)

    def gradient(states: Tensor, chunk_rows: int) -> Tensor:
        monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", chunk_rows)
        lm_head = (target.lm_head / 2).requires_grad_()
        SlotLosses.apply(states, lm_head, weights, finals, target)[0].backward()
        assert lm_head.grad is not None
        return lm_head.grad

    exact = gradient(hidden, rows)
    whole, chunked = (
        float((gradient(hidden.bfloat16(), chunk_rows) - exact).norm() / exact.norm())
        for chunk_rows in (rows, 30)
    )
    assert 0 < whole < 0.01
    assert chunked < 2 * whole
