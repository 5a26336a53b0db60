# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: kept and pruned, never half; the learning rate's schedules; recomputation."""

import threading
from pathlib import Path

import pytest
import torch

from shared.errors import UserError
from shared.io import files
from stages.train.loop import checkpoint as checkpoint_module
from stages.train.loop.checkpoint import Checkpoints, load
from stages.train.loop.optimizer import lr_factor
from stages.train.objective.loss import ttt_loss
from tests.quick.train.objective.cases import Case, gradients, make_case


def state(step: int, weight: torch.Tensor | None = None) -> dict[str, object]:
    weights = {"w": torch.full((2,), float(step)) if weight is None else weight}
    plain = {
        "optimizer": {},
        "scheduler": {},
        "rng": torch.zeros(1),
        "best": {"step": 0},
        "sums": None,
    }
    return {"step": step, "weights": weights, **plain}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_are_kept_and_the_best_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30, 40, 50):
        checkpoints.save(state(step), best=step == 20)
    checkpoints.wait()
    steps = {"step_00000020.pt", "step_00000040.pt", "step_00000050.pt"}
    assert names(tmp_path) == steps | {"latest.pt", "best.pt"}
    assert load(tmp_path / "latest.pt")["step"] == 50
    assert load(tmp_path / "best.pt")["step"] == 20


def test_a_kill_between_the_two_links_leaves_a_state_to_continue_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latest state names the best one: it may not be there first."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(state(10))
    checkpoints.wait()
    link, links = files.write_link, []

    def killed_after_one(path: Path, name: str) -> None:
        if links:
            raise KeyboardInterrupt
        links.append(link(path, name))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_link", killed_after_one)
        checkpoints.save({**state(20), "best": {"step": 20}}, best=True)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait()
    latest = load(tmp_path / "latest.pt")
    assert latest["step"] == 10
    assert load(tmp_path / "best.pt")["step"] == 20  # found out again, or not
    checkpoint_module.restore_best(tmp_path, {**latest, "best": {"step": 10}})
    assert load(tmp_path / "best.pt")["step"] == 10


def test_a_state_is_copied_before_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, write = threading.Event(), torch.save

    def slow_save(*arguments: object) -> None:
        assert go_on.wait(10)
        write(*arguments)

    monkeypatch.setattr(torch, "save", slow_save)
    weight = torch.ones(2)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state(1, weight))  # returns while the file is not written yet
    assert load(tmp_path / "latest.pt") is None
    weight.fill_(7.0)
    go_on.set()
    checkpoints.wait()
    assert load(tmp_path / "latest.pt")["weights"]["w"].tolist() == [1.0, 1.0]


def test_a_full_disk_is_told_by_the_next_save(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=1)
    folder.write_text("no folder")
    checkpoints.save(state(1))
    with pytest.raises(UserError, match="could not write"):
        checkpoints.save(state(2))


def test_a_damaged_checkpoint_names_the_older_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(state(1))
    checkpoints.save(state(2))
    checkpoints.wait()
    (tmp_path / "step_00000002.pt").write_bytes(b"half")
    with pytest.raises(UserError, match=r"step_00000001\.pt"):
        load(tmp_path / "latest.pt")


@pytest.mark.parametrize(
    ("schedule", "expected"), [("linear", 0.5), ("cosine", 0.5), ("linear at 4", 0.75)]
)
def test_schedules(schedule: str, expected: float) -> None:
    name, _, step = schedule.partition(" at ")
    options = {"total": 10, "warmup": 2, "minimum": 0.0}
    assert lr_factor(name, 0, **options) == 0.5
    assert lr_factor(name, 1, **options) == 1.0
    assert lr_factor(name, 2, **options) == 1.0
    assert lr_factor(name, int(step or 6), **options) == pytest.approx(expected)
    assert lr_factor(name, 10, total=10, warmup=2, minimum=0.1) == pytest.approx(0.1)


def test_a_cosine_is_no_line() -> None:
    assert lr_factor("cosine", 4, total=10, warmup=2, minimum=0.0) == pytest.approx(0.853553)


def stored_elements(case: Case) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, and how many numbers the forward pass kept for the backward pass."""
    case.head.zero_grad()
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = ttt_loss(case.head, case.batch, case.output, num_steps=3, decay=0.8)
    loss.backward()
    return loss.item(), gradients(case.head), sum(kept)


def test_recomputed_activations_give_the_same_gradients() -> None:
    case = make_case(seed=2)
    loss, expected, whole = stored_elements(case)
    case.head.recompute_activations = True
    again, found, less = stored_elements(case)
    assert loss == again
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert less < whole
