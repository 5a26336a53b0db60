# SPDX-License-Identifier: Apache-2.0
"""A training in this process: what it ends with, and what it refuses to go on from."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from shared.contracts.head_variant import named_variant
from shared.errors import Stopped, UserError
from shared.io import files
from shared.runtime.process import stop_requested
from stages.train.loop import checkpoint
from stages.train.loop.trainer import Trainer
from tests.quick.train.export.small_head import CONFIG, make_head
from tests.quick.train.loop.small_training import DRAFT_TOKENS, best_step, trainer


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_the_target_s_own_products_are_in_the_run_s_precision(
    tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    """In float32 they would cost more than the head's on a device that is made for bfloat16."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        training = trainer(tmp_path, mixed_precision=precision, answer_tokens=DRAFT_TOKENS + 1)
        assert training.module.target.lm_head.dtype == dtype
        assert training.run().steps == 6
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_where_nothing_can_be_drafted_the_last_head_is_the_best(tmp_path: Path) -> None:
    """The prompt's own pass gives an answer's first token, and a walk must know K tokens ahead."""
    training = trainer(tmp_path, answer_tokens=DRAFT_TOKENS)
    outcome = training.run()
    assert (outcome.held_out, outcome.steps) == (2, 6)
    assert outcome.walked_acceptance_length is None
    assert outcome.best_step == best_step(training) == 6
    assert "walked_acceptance_length" not in training.history.path.read_text()


def test_the_recipe_s_loss_is_trained_on(tmp_path: Path) -> None:
    losses = {}
    for loss in ("cross_entropy", "tv"):
        training = trainer(tmp_path / loss, more={"loss": loss})
        training.run()
        losses[loss] = training.losses.mean
    assert 0 < losses["tv"] < 1 < losses["cross_entropy"]


def test_one_token_more_is_walked(tmp_path: Path) -> None:
    training = trainer(tmp_path, answer_tokens=DRAFT_TOKENS + 1)
    outcome = training.run()
    assert outcome.walked_acceptance_length == training.best["value"] >= 1.0
    assert outcome.best_step == best_step(training)
    assert training.history.path.read_text().count("walked_acceptance_length") == 6


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {1, 6}),  # the first walk is the best; five minutes have not passed
        ({"checkpoint_every_minutes": "1e-9"}, {1, 2, 3, 4, 5, 6}),
        ({"checkpoint_every_steps": "2", "checkpoint_every_minutes": "1e-9"}, {1, 2, 4, 6}),
    ],
)
def test_checkpoints_are_minutes_or_steps_apart(
    tmp_path: Path, settings: dict[str, str], expected: set[int]
) -> None:
    """At a rate of nearly nothing no later walk is better."""
    more = {"learning_rate": "1e-12", "keep_checkpoints": "9", **settings}
    training = trainer(tmp_path, more=more)
    training.run()
    saved = {int(path.stem[5:]) for path in training.checkpoints.folder.glob("step_*.pt")}
    assert saved == expected


def test_of_several_ranks_the_first_one_s_clock_decides(tmp_path: Path) -> None:
    """They meet every ten steps."""
    training = trainer(tmp_path, more={"checkpoint_every_minutes": "1e-9"})
    found = {}
    for is_main in (True, False):
        for training.step in (10, 11):
            training.accelerator = SimpleNamespace(
                num_processes=2, is_main_process=is_main, reduce=lambda tensor: tensor
            )
            found[is_main, training.step] = training._is_due()
    assert found == {(True, 10): True, (True, 11): False, (False, 10): False, (False, 11): False}


def test_a_training_that_ends_before_its_first_step_begins_anew(tmp_path: Path) -> None:
    """A dump that it follows may be gone by then."""
    training = trainer(tmp_path)
    training._save_and_wait()
    assert checkpoint.load(training.checkpoints.folder / checkpoint.LATEST) is None


@pytest.mark.parametrize(("max_steps", "made"), [(4, 4), (8, 8), (99, 12)])
def test_steps_may_be_limited_within_an_epoch(tmp_path: Path, max_steps: int, made: int) -> None:
    """Two epochs of six steps; the learning rate has come down at the last step that is made."""
    sizes = {"max_steps": str(max_steps)}
    training = trainer(tmp_path, more={**sizes, "epochs": "2", "eval_every_steps": "50"})
    assert training.run().steps == training.total_steps == made
    lowest = training.config.min_lr_fraction * float(training.config.learning_rate)
    assert training.scheduler.get_last_lr()[0] == pytest.approx(lowest)


def test_a_training_ends_on_a_plateau_and_so_does_a_resumed_one(tmp_path: Path) -> None:
    """At a rate of nearly nothing the first walk stays the best one, so it ends five walks later."""
    settings = {"epochs": "10", "learning_rate": "1e-12", "plateau_fraction": "0.01"}
    training = trainer(tmp_path, more=settings)
    outcome = training.run()
    assert (outcome.best_step, outcome.steps, training.total_steps) == (1, 6, 60)
    assert outcome.tokens == 6 * 12
    kept = training.history.path.read_text()
    assert json.loads(kept.splitlines()[-1])["step"] == 6
    again = trainer(
        tmp_path, more=settings
    )  # as after a kill between the last save and the manifest
    assert dataclasses.replace(again.run(), seconds=outcome.seconds) == outcome
    assert again.history.path.read_text() == kept


def stopped_at_2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A training that all ranks agreed to stop after step 2."""
    training = trainer(folder)
    monkeypatch.setattr(training, "_all_agree_to_stop", lambda: training.step == 2)
    with pytest.raises(Stopped, match="step 2 is saved"):
        training.run()
    return training


def test_what_another_rank_was_asked_stops_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = stopped_at_2(tmp_path, monkeypatch)
    assert not stop_requested()
    state = checkpoint.load(training.checkpoints.folder / checkpoint.LATEST)
    assert state is not None and state["step"] == 2


def test_a_training_goes_on_with_the_best_that_its_state_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two links, a later state is the best one, which was not the latest yet."""
    first = stopped_at_2(tmp_path, monkeypatch)
    expected, folder = best_step(first), first.checkpoints.folder
    shutil.copy(folder / "step_00000002.pt", folder / "step_00000003.pt")
    files.write_link(folder / checkpoint.BEST, "step_00000003.pt")
    again = trainer(tmp_path)
    again._resume()
    assert again.step == 2
    assert (folder / checkpoint.BEST).resolve().name == f"step_{expected:08d}.pt"


def test_a_training_of_another_variant_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_at_2(tmp_path, monkeypatch)
    newer = make_head(dataclasses.replace(CONFIG, variant=named_variant("eagle3.1")))
    with pytest.raises(
        UserError, match=r"others: \['fc_norm.0.weight'.* Set train.variant"
    ) as refused:
        trainer(tmp_path, head=newer).run()
    assert refused.value.code == "checkpoint-of-another-variant"
