# SPDX-License-Identifier: Apache-2.0
"""The training loop: batches, steps, walks, checkpoints.

Everything that decides the weights is in the checkpoint or follows from the config and the step
number, so that a killed run, started again, ends with the same weights.
"""

import dataclasses
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shared import files
from shared.errors import OutputError, UserError
from shared.process import stop_if_requested, stop_requested
from shared.status import Status
from shared.target import TargetConfig, TargetTensors
from stages.train import checkpoint
from stages.train.config import TrainConfig
from stages.train.data import Batch, Dataset, Sample, pack, training_batches
from stages.train.loss import StepSums, TargetOutput, combine, target_argmax, ttt_loss
from stages.train.model import DraftHead
from stages.train.walk import Walk, walked_acceptance_length

LOG_EVERY_STEPS = 10

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished training says of itself."""

    samples: int
    held_out: int
    tokens: int
    steps: int
    best_step: int
    walked_acceptance_length: float | None
    final_loss: float
    seconds: float

    def facts(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def lr_factor(step: int, *, total: int, warmup: int, minimum: float) -> float:
    """Linear warm-up to 1 over `warmup` steps, then a cosine down to `minimum` at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Trainer:
    """One training run in `folder`."""

    def __init__(
        self,
        config: TrainConfig,
        target_config: TargetConfig,
        tensors: TargetTensors,
        head: DraftHead,
        dataset: Dataset,
        folder: Path,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.folder = folder
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        if self.accelerator.num_processes > 1:
            raise UserError("train runs as one process so far; start it without torchrun.")
        if not dataset.training:
            raise UserError("dump holds too few samples to train on: expected at least two.")
        self.device = self.accelerator.device
        self.head = head.to(self.device)
        for parameter in self.head.lm_head.parameters():
            parameter.requires_grad_(config.train_lm_head)
        rows = head.to_target_ids(torch.arange(head.config.draft_vocab_size, device=self.device))
        self.target = TargetOutput(
            norm_weight=tensors.norm_weight.to(self.device).float(),
            norm_eps=tensors.norm_eps,
            lm_head=tensors.lm_head.to(self.device)[rows].float(),
            logit_scale=target_config.logit_scale,
            softcap=target_config.logit_softcap,
        )
        dataset.set_in_vocab(self._in_vocab(tensors))
        trained = [p for p in self.head.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.total_steps = sum(1 for _ in self._batches())
        warmup = round(config.warmup_fraction * self.total_steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: lr_factor(
                step, total=self.total_steps, warmup=warmup, minimum=config.min_lr_fraction
            ),
        )
        self.step = 0
        self.best: dict[str, float] = {"value": -math.inf, "step": 0}
        self.loss = math.nan

    def _in_vocab(self, tensors: TargetTensors) -> list[torch.Tensor]:
        """For each shard [T] bool: can the draft head propose what the target itself would say?"""
        if self.head.config.draft_vocab_size == self.head.config.vocab_size:
            return [
                torch.ones(len(shard.input_ids), dtype=torch.bool) for shard in self.dataset.shards
            ]
        norm_weight = tensors.norm_weight.to(self.device).float()
        lm_head = tensors.lm_head.to(self.device)
        flags = []
        for shard in self.dataset.shards:
            best = target_argmax(
                shard.hidden_states[:, -1].to(self.device),
                norm_weight=norm_weight,
                norm_eps=tensors.norm_eps,
                lm_head=lm_head,
            )
            flags.append(self.head.t2d[best].cpu())
        return flags

    def _batches(self) -> Iterator[list[Sample]]:
        return training_batches(
            self.dataset.training,
            batch_tokens=self.config.batch_tokens,
            seed=self.config.run.seed,
            epochs=self.config.epochs,
        )

    def run(self) -> Outcome:
        """Train to the end, from the last checkpoint where there is one.

        Raises:
            Stopped: after a save, when asked to.
            OutputError: the loss is no number any more.
        """
        self._resume()
        status = Status(self.config.paths.status("train"))
        status.started()
        started_s, started_step, tokens = time.monotonic(), self.step, 0
        sums: list[StepSums] = []
        for samples in itertools.islice(self._batches(), self.step, None):
            batch = self.dataset.batch(samples).to(self.device)
            sums.append(self._train_step(batch))
            tokens += len(batch.input_ids)
            if self.step % LOG_EVERY_STEPS == 0 or self.step == self.total_steps:
                self._record(combine(sums))
                sums = []
            if self.step % self.config.eval_every_steps == 0 or self.step == self.total_steps:
                self._evaluate()
            if self.step % self.config.checkpoint_every_steps == 0 or stop_requested():
                self._save("latest")
                stop_if_requested(f"step {self.step} is saved")
            rate = tokens / (time.monotonic() - started_s)
            status.progress(
                self.step,
                self.total_steps,
                "steps",
                loss=f"{self.loss:.4f}",
                walked_al=f"{self.best['value']:.3f}",
                tokens_per_s=f"{rate:.0f}",
            )
        self._save("latest")
        walked = self.best["value"] if self.dataset.held_out else None
        return Outcome(
            samples=len(self.dataset.training) + len(self.dataset.held_out),
            held_out=len(self.dataset.held_out),
            tokens=tokens,
            steps=self.step,
            best_step=int(self.best["step"]),
            walked_acceptance_length=walked,
            final_loss=self.loss,
            seconds=round(time.monotonic() - started_s, 1) if self.step > started_step else 0.0,
        )

    def _train_step(self, batch: Batch) -> StepSums:
        with self.accelerator.autocast():
            loss, sums = ttt_loss(
                self.head,
                batch,
                self.target,
                num_steps=self.config.ttt_steps,
                decay=self.config.loss_decay,
            )
        if not bool(torch.isfinite(loss)):
            raise OutputError(
                f"step {self.step + 1}: the loss is {float(loss)}. The batch holds the samples "
                f"{list(batch.sample_ids)}. Lower train.learning_rate, or look at their states."
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.head.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return sums

    def _record(self, sums: StepSums) -> None:
        self.loss = sums.mean_loss(self.config.loss_decay)
        accuracy = [round(value, 4) for value in sums.accuracy().tolist()]
        self._append({"step": self.step, "loss": self.loss, "accuracy": accuracy})

    def _evaluate(self) -> None:
        """Walk the held-out answers; the best walk so far is kept for the export."""
        if self.dataset.held_out:
            self.head.eval()
            batches = pack(self.dataset.held_out, self.config.batch_tokens)
            walked: Walk = walked_acceptance_length(
                self.head,
                (self.dataset.batch(batch).to(self.device) for batch in batches),
                self.config.walk_tokens,
            )
            self.head.train()
            value = walked.acceptance_length
            per_position = [round(share, 4) for share in walked.acceptance_by_position()]
            record = {"step": self.step, "walked_acceptance_length": value}
            self._append({**record, "per_position": per_position, "drafts": walked.drafts})
            logger.info("step %d: walked acceptance length %.3f", self.step, value)
        else:
            value = float(self.step)
        if value > self.best["value"]:
            self.best = {"value": value, "step": self.step}
            self._save("best")

    def _append(self, record: dict[str, Any]) -> None:
        with (self.folder / "history.jsonl").open("a", encoding="utf-8") as history:
            history.write(json.dumps(record) + "\n")

    def _save(self, name: str) -> None:
        checkpoint.save(
            self.folder / "checkpoints" / f"{name}.pt",
            {
                "step": self.step,
                "weights": self.head.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "rng": torch.get_rng_state(),
                "best": self.best,
            },
        )

    def _resume(self) -> None:
        state = checkpoint.load(self.folder / "checkpoints" / "latest.pt")
        if state is None:
            self._keep_history(0)
            return
        self.step = state["step"]
        self.best = state["best"]
        self.head.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        self._keep_history(self.step)
        logger.info("continuing from step %d of %d", self.step, self.total_steps)

    def _keep_history(self, last_step: int) -> None:
        """Drop what a killed run recorded after its last checkpoint: those steps come again."""
        path = self.folder / "history.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= last_step]
        files.write_text(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the line that the kill cut
        return math.inf
