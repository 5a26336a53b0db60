# SPDX-License-Identifier: Apache-2.0
"""The training step on the card: against the plain reference, the plain kernels, and without a wait."""

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator

from stages.train.kernels.fused import is_fused
from stages.train.loop.optimizer import make_optimizer
from stages.train.loop.step import TrainingStep, train_step
from stages.train.objective.loss import ttt_loss
from stages.train.objective.walk import walked_acceptance_length
from tests.quick.train.kernels.test_triton import check_attention, check_loss
from tests.quick.train.objective.cases import CONFIG, Case, make_case, reference_loss

pytestmark = pytest.mark.gpu

NUM_STEPS = 3
# Of float64. Products on a card round bfloat16 once more than the plain version does.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = range(40)


def moved(case: Case, device: torch.device) -> Case:
    """The same problem on the device, its plan made beforehand as the loader does."""
    norm = case.output.norm.to(device)
    output = dataclasses.replace(case.output, norm=norm, lm_head=case.output.lm_head.to(device))
    blocks = not is_fused(output.lm_head)
    batch = case.batch.planned(NUM_STEPS, blocks=blocks).to(device)
    return case._replace(head=case.head.to(device), output=output, batch=batch)


@contextlib.contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """A block in which an operator that the host waits for is an error."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("dtype", "of_loss", "of_gradients"),
    [(torch.float32, 1e-4, 1e-4), (torch.bfloat16, 2e-2, 5e-2)],
)
def test_values_and_gradients_are_the_reference_s(
    device: torch.device, dtype: torch.dtype, of_loss: float, of_gradients: float
) -> None:
    """A head wide enough that bfloat16's rounding evens out."""
    config = dataclasses.replace(
        CONFIG, hidden_size=64, target_hidden_size=64, intermediate_size=96, head_dim=16
    )
    case = make_case(config, seed=3)
    expected, expected_grads = reference_loss(case, num_steps=NUM_STEPS, decay=0.8)
    case = moved(case, device)
    with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
        loss, sums = ttt_loss(case.head, case.batch, case.output, num_steps=NUM_STEPS, decay=0.8)
    loss.backward()
    assert sums.counted.tolist() == expected["counted"]
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=of_loss)
    found = {name: p.grad.double().cpu() for name, p in case.head.named_parameters()}
    off = {n: float((found[n] - g).norm() / g.norm()) for n, g in expected_grads.items()}
    assert max(off.values()) < of_gradients, off


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("check", [check_attention, check_loss])
def test_kernels_are_as_exact_as_the_plain_versions(
    device: torch.device, check: object, dtype: torch.dtype
) -> None:
    if device.type != "cuda":
        pytest.skip("on a CPU the interpreter runs the kernels, in tests/stages/train")
    with torch.device(device):
        found = {seed: check(seed, dtype) for seed in SHAPES}
    assert max(found.values()) <= LIMITS[dtype], found


def test_a_step_never_waits_for_the_device(device: torch.device) -> None:
    case = moved(make_case(seed=1), device)
    accelerator = Accelerator(cpu=device.type == "cpu")
    module = TrainingStep(case.head, case.output, num_steps=NUM_STEPS, decay=0.8)
    optimizer = make_optimizer(module, learning_rate=1e-3)
    losses = []
    for index in range(4):
        # The first step compiles the kernels and makes AdamW's state.
        with no_waits(device) if index else contextlib.nullcontext():
            loss, _ = train_step(
                accelerator,
                module,
                optimizer,
                [case.batch],
                num_steps=NUM_STEPS,
                max_grad_norm=1.0,
            )
        losses.append(loss)
    assert losses[-1].item() < losses[0].item()


def test_the_walk_is_the_cpu_s(device: torch.device) -> None:
    case = make_case(lengths=(40, 33, 5), seed=2, answer_share=0.95)
    expected = walked_acceptance_length(case.head, [case.batch], NUM_STEPS)
    case = moved(case, device)
    assert walked_acceptance_length(case.head, [case.batch], NUM_STEPS) == expected
    assert expected.drafts > 3
