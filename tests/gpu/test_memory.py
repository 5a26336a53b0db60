# SPDX-License-Identifier: Apache-2.0
"""What travels between main memory and the card: batches to it, checkpoints from it, without a wait."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from stages.train.data.loader import loaded, ready
from stages.train.loop import checkpoint, distributed
from stages.train.loop.checkpoint import Checkpoints
from stages.train.loop.optimizer import make_optimizer
from stages.train.loop.step import TrainingStep, train_step
from tests.gpu.test_step import NUM_STEPS, moved, no_waits
from tests.quick.train.loop.small_training import dataset
from tests.quick.train.objective.cases import make_case

pytestmark = pytest.mark.gpu


def test_batches_come_from_page_locked_memory_and_whole(
    device: torch.device, tmp_path: Path
) -> None:
    found = dataset(tmp_path)
    found.set_in_vocab([torch.ones(len(shard.input_ids)).half() for shard in found.shards])
    on_card = device.type == "cuda"
    batch = ready(found, found.training[:2], NUM_STEPS, pin=on_card, blocks=not on_card)
    tensors = [x for x in vars(batch).values() if isinstance(x, torch.Tensor)]
    assert {x.is_pinned() for x in (*tensors, *batch.plan[:3])} == {on_card}
    jobs = [found.training[start : start + 2] for start in range(0, len(found.training), 2)]
    arrived = loaded(iter(jobs), lambda job: [ready(found, job, NUM_STEPS, pin=on_card)], device)
    for job, (batch,) in zip(jobs, arrived, strict=True):
        expected = found.batch(job)
        assert batch.aux_states.device.type == device.type
        assert torch.equal(batch.aux_states.cpu(), expected.aux_states)
        assert torch.equal(batch.final_states.cpu(), expected.final_states)


def test_a_checkpoint_is_the_state_of_its_step_and_the_loop_goes_on(
    device: torch.device, tmp_path: Path
) -> None:
    """The steps behind it are queued while its copies are still on their way."""
    case = moved(make_case(seed=1), device)
    accelerator = Accelerator(cpu=device.type == "cpu")
    module = TrainingStep(case.head, case.output, num_steps=NUM_STEPS, decay=0.8)
    optimizer = make_optimizer(module, learning_rate=1e-1)
    checkpoints = Checkpoints(tmp_path, keep=9)
    expected = {}
    for step in range(1, 5):
        train_step(
            accelerator, module, optimizer, [case.batch], num_steps=NUM_STEPS, max_grad_norm=1.0
        )
        expected[step] = {n: w.detach().clone() for n, w in case.head.state_dict().items()}
        state = {"step": step, **distributed.gather_state(module, optimizer)}
        checkpoints.wait()
        # The first one makes the buffers.
        with no_waits(device if step > 1 else torch.device("cpu")):
            checkpoints.save({**state, "scheduler": {}, "rng": None, "best": {}, "sums": None})
    checkpoints.wait()
    for step, weights in expected.items():
        found = checkpoint.load(tmp_path / f"step_{step:08d}.pt")
        assert found is not None
        for name, weight in found["weights"].items():
            assert torch.equal(weight, weights[name].cpu()), (step, name)
