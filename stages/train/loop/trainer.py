# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, walks, checkpoints.

The weights depend on the checkpoint, the config and the step number alone, so a killed run that is
started again ends with the same weights. Every rank runs this. Loss, stop requests and walks are
summed over the ranks before a decision, so that all decide alike.
"""

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from shared.errors import UserError
from shared.runtime import processor
from shared.runtime.process import stop_requested, stopped
from shared.runtime.status import Status
from shared.target.tensors import TargetTensors
from stages.train.config import TrainConfig
from stages.train.data.batch import Batch
from stages.train.data.dataset import Dataset, Sample, training_steps
from stages.train.data.loader import loaded, micro_batches
from stages.train.kernels.fused import is_fused
from stages.train.loop import budget, checkpoint, distributed
from stages.train.loop.checkpoint import Checkpoints
from stages.train.loop.evaluation import walk_held_out
from stages.train.loop.following import Following
from stages.train.loop.history import History, Outcome, progress_figures
from stages.train.loop.losses import Losses
from stages.train.loop.optimizer import lr_factor, make_optimizer
from stages.train.loop.step import TrainingStep, train_step
from stages.train.model import DraftHead
from stages.train.objective.in_vocab import in_vocab_shares
from stages.train.objective.target_output import TargetOutput

LOG_EVERY_STEPS = 10
logger = logging.getLogger(__name__)


class Trainer:
    """One training run in `folder`, on this rank."""

    def __init__(
        self,
        config: TrainConfig,
        tensors: TargetTensors,
        head: DraftHead,
        dataset: Dataset,
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        if not dataset.training:
            raise UserError(
                "expected at least one sample in dump to train on, found none.",
                code="too-few-samples",
                remedy="Give synth more prompts and run dump again.",
            )
        self.config = config
        self.batch_tokens = int(config.batch_tokens)  # `budget.resolved` has set it
        self.dataset = dataset
        self.accelerator = accelerator
        self.device = accelerator.device
        head.to(self.device)
        head.recompute_activations = config.recompute_activations
        head.lm_head.requires_grad_(config.train_lm_head)
        status = Status(config.paths.status(config.process_name))
        dataset.set_in_vocab(
            in_vocab_shares(dataset, head, tensors, folder / "in_vocab", accelerator, status)
        )
        step = _training_step(config, tensors, head, accelerator)
        self.needs_blocks = not is_fused(step.target.lm_head)  # the kernels need none
        self.module = distributed.joined(accelerator, step, config.distributed)
        self.optimizer = make_optimizer(
            self.module,
            learning_rate=float(config.learning_rate),
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            muon=step.target.lm_head.dtype if config.optimizer == "muon" else None,
            adamw_rate=budget.adamw_rate(config, head.config.hidden_size),
        )
        self.total_steps = sum(1 for _ in self._steps())
        self.warmup_steps = budget.warmup_steps(config, self.total_steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.following = Following(dataset, self._steps(), folder, accelerator)
        self.checkpoints = Checkpoints(
            folder / "checkpoints", keep=config.keep_checkpoints, on_saved=self.following.saved
        )
        self.history = History(folder / "history.jsonl", accelerator)
        self.step = 0
        self.best: dict[str, float] = {"value": -math.inf, "step": 0, "is_walked": False}
        self.losses = Losses(accelerator, self.history, config.loss_decay)
        self.walked = math.nan
        self.saved_step = -1

    def _lr_factor(self, step: int) -> float:
        return lr_factor(
            self.config.schedule,
            step,
            total=self.total_steps,
            warmup=self.warmup_steps,
            minimum=self.config.min_lr_fraction,
        )

    def _steps(self, end: int | None = None) -> Iterator[list[Sample]]:
        steps = training_steps(
            self.dataset.training,
            batch_tokens=self.batch_tokens,
            seed=self.config.run.seed,
            epochs=self.config.epochs,
            is_mixed=not self.config.follow,
        )
        return itertools.islice(itertools.islice(steps, self.config.max_steps), end)

    def run(self) -> Outcome:
        """Train to the end, from the last checkpoint if there is one.

        Raises:
            Stopped: after SIGTERM and a save.
            OutputError: a loss is NaN or infinite.
            RetryableError: a followed dump is gone; the last step is saved.
        """
        self._resume()
        if self.accelerator.is_main_process:
            budget.tell(self.config, self.total_steps, self.warmup_steps)
        status = Status(self.config.paths.status(self.config.process_name))
        status.started()
        started_s, started_step, tokens = time.monotonic(), self.step, 0
        batches = self._batches(lambda: self.following.tell(status, self.step, self.total_steps))
        with self.following.waiting(self._save_and_wait):
            for samples, micros in zip(self._remaining_steps(), batches, strict=True):
                self._take_step(micros, samples)
                tokens += sum(sample.num_tokens for sample in samples)
                self._after_step()
                self._show(status, tokens / (time.monotonic() - started_s))
                if self._is_on_plateau():
                    logger.info(
                        "step %d: no better walk since step %d", self.step, self.best["step"]
                    )
                    break
        self._save_and_wait()
        self.following.finished()
        self.accelerator.end_training()
        return Outcome(
            samples=len(self.dataset.training) + len(self.dataset.held_out),
            held_out=len(self.dataset.held_out),
            tokens=sum(s.num_tokens for step in self._steps(self.step) for s in step),
            steps=self.step,
            best_step=int(self.best["step"]),
            walked_acceptance_length=self.best["value"] if self.best["is_walked"] else None,
            final_loss=self.losses.mean,
            seconds=round(time.monotonic() - started_s, 1) if self.step > started_step else 0.0,
            mixed_precision=str(self.accelerator.mixed_precision),
        )

    def _take_step(self, micros: list[Batch], samples: list[Sample]) -> None:
        loss, sums = train_step(
            self.accelerator,
            self.module,
            self.optimizer,
            micros,
            num_steps=self.config.ttt_steps,
            max_grad_norm=self.config.max_grad_norm,
            profile=self.config.profile_ranges,
        )
        self.scheduler.step()
        self.step += 1
        self.losses.add(loss, sums, samples)

    def _show(self, status: Status, tokens_per_s: float) -> None:
        losses = self.losses
        figures = progress_figures(
            losses.mean, losses.accuracy, self.walked, tokens_per_s, self.device
        )
        status.progress(self.step, self.total_steps, "steps", **figures)

    def _remaining_steps(self) -> Iterator[list[Sample]]:
        end = self.step if self._is_on_plateau() else None  # resumed where it had ended
        return itertools.islice(self._steps(end), self.step, None)

    def _is_on_plateau(self) -> bool:
        return budget.is_on_plateau(self.config, self.step, self.best["step"], self.total_steps)

    def _batches(self, while_waiting: Callable[[], None]) -> Iterator[list[Batch]]:
        """This rank's micro-batches of the remaining steps, on its device."""
        make = functools.partial(
            micro_batches,
            self.dataset,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            micro_tokens=self.config.micro_batch_tokens or self.batch_tokens,
            num_steps=self.config.ttt_steps,
            pin=self.device.type == "cuda",
            blocks=self.needs_blocks,
        )
        return loaded(self._remaining_steps(), make, self.device, while_waiting=while_waiting)

    def _after_step(self) -> None:
        """Record, walk, save and stop, whichever is due."""
        last, is_best = self.step == self.total_steps, False
        if last or self.step % LOG_EVERY_STEPS == 0:
            self.losses.record(self.step)
        if last or self.step % self.config.eval_every_steps == 0:
            self.losses.check(self.step)
            is_best = self._evaluate()
            if self.device.type == "cpu":
                processor.release_freed_memory()
            if not self.losses.is_recorded and self._is_on_plateau():  # nothing comes after it
                self.losses.record(self.step)
        stops = self._all_agree_to_stop()
        if is_best or stops or self._is_due() or self.following.is_due(self.step):
            self.losses.check(self.step)
            self._save(best=is_best)
        if stops:
            self.checkpoints.wait()
            # Even if another rank alone got the signal, since no rank can go on without it.
            raise stopped(f"step {self.step} is saved")

    def _all_agree_to_stop(self) -> bool:
        return self._any_rank(stop_requested())

    def _is_due(self) -> bool:
        """Whether a checkpoint is due; the clock is rank 0's."""
        if self.config.checkpoint_every_steps is not None:
            return self.step % self.config.checkpoint_every_steps == 0
        is_old = self.checkpoints.age_s() > 60 * self.config.checkpoint_every_minutes
        return self._any_rank(is_old and self.accelerator.is_main_process)

    def _any_rank(self, wants: bool) -> bool:
        """Whether any rank wants it; the ranks exchange that every few steps."""
        if self.accelerator.num_processes == 1:
            return wants
        if self.step % LOG_EVERY_STEPS:
            return False
        votes = torch.tensor(float(wants), device=self.device)
        return bool(distributed.summed(self.accelerator, votes) > 0)

    def _evaluate(self) -> bool:
        """Walk the held-out answers; whether this walk is the best so far."""
        value = float(self.step)
        walked = None
        if self.dataset.held_out:
            walked = walk_held_out(
                self.config,
                self.module,
                self.dataset,
                self.accelerator,
                self.batch_tokens,
                blocks=self.needs_blocks,
            )
        if walked and not walked.drafts:
            logger.warning("the held-out answers are too short for a draft: the last head is kept")
            walked = None
        if walked:
            value = self.walked = walked.acceptance_length
            shares = [round(share, 4) for share in walked.acceptance_by_position()]
            record = {"walked_acceptance_length": value, "per_position": shares}
            self.history.append(self.step, {**record, "drafts": walked.drafts})
            logger.info("step %d: walked acceptance length %.3f", self.step, value)
        is_best = value > self.best["value"]
        if is_best:
            self.best = {"value": value, "step": self.step, "is_walked": walked is not None}
        return is_best

    def _save_and_wait(self) -> None:
        self.losses.check(self.step)
        self._save()
        self.checkpoints.wait()

    def _save(self, *, best: bool = False) -> None:
        # Before the first step there is nothing to save, and torch would count one into the moments.
        if self.step in (0, self.saved_step):
            return
        state = {
            "step": self.step,
            **distributed.gather_state(self.module, self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "best": self.best,
            **self.losses.state(),
        }
        if self.accelerator.is_main_process:
            self.checkpoints.save(state, best=best)
        self.saved_step = self.step
        self.following.saving(self.step)

    def _resume(self) -> None:
        self.accelerator.wait_for_everyone()
        state = checkpoint.load(self.checkpoints.folder / checkpoint.LATEST)
        self.history.keep(state["step"] if state else 0)
        self.following.resumed(state["step"] if state else 0)
        if state is None:
            return
        if self.accelerator.is_main_process:
            checkpoint.restore_best(self.checkpoints.folder, state)
        self.step = state["step"]
        self.best = {"is_walked": bool(self.dataset.held_out), **state["best"]}
        distributed.restore_state(self.module, self.optimizer, state)
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        self.losses.restore(state)
        logger.info("continuing from step %d of %d", self.step, self.total_steps)


def _training_step(
    config: TrainConfig, tensors: TargetTensors, head: DraftHead, accelerator: Accelerator
) -> TrainingStep:
    target = TargetOutput.of(tensors, accelerator, head.token_ids())
    steps, decay = config.ttt_steps, config.loss_decay
    return TrainingStep(head, target, num_steps=steps, decay=decay, loss=config.loss)
