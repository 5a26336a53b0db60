# SPDX-License-Identifier: Apache-2.0
"""Loss and accuracy of the steps, over all ranks.

A look at them waits for the device and for the other ranks, so it is taken every few steps.
"""

import functools
import math
from typing import Any

import torch
from accelerate import Accelerator

from shared.errors import OutputError
from stages.train.data.dataset import Sample
from stages.train.loop.distributed import summed
from stages.train.loop.history import History
from stages.train.objective.loss import StepSums, combine


class Losses:
    """What the steps have lost.

    Attributes:
        mean: loss of the steps of the last record; NaN before the first.
        accuracy: of the same steps, one for each TTT step.
    """

    def __init__(self, accelerator: Accelerator, history: History, decay: float) -> None:
        self.mean = math.nan
        self.accuracy: list[float] = []
        self._history, self._decay = history, decay
        self._summed = functools.partial(summed, accelerator)
        self._is_main, self._device = accelerator.is_main_process, accelerator.device
        self._unchecked: list[tuple[torch.Tensor, list[str]]] = []  # losses, and sample ids
        self._sums: list[StepSums] = []  # since the last record

    def add(self, loss: torch.Tensor, sums: StepSums, samples: list[Sample]) -> None:
        """Take in a step: this rank's share of its loss, and its sums."""
        self._unchecked.append((loss, [sample.sample_id for sample in samples]))
        self._sums.append(sums)

    def check(self, step: int) -> None:
        """Require that every loss since the last check is finite.

        Args:
            step: the last one taken in.

        Raises:
            OutputError: one is NaN or infinite.
        """
        if not self._unchecked:
            return
        losses = self._summed(torch.stack([loss.double() for loss, _ in self._unchecked]))
        for index, loss in enumerate(losses.tolist()):
            if not math.isfinite(loss):
                raise _not_finite(
                    loss, step - len(self._unchecked) + 1 + index, self._unchecked[index][1]
                )
        self._unchecked = []

    @property
    def is_recorded(self) -> bool:
        """Whether no step was taken in since the last record."""
        return not self._sums

    def record(self, step: int) -> None:
        """Record loss and accuracy of the steps since the last record.

        Raises:
            OutputError: as `check`.
        """
        self.check(step)
        total = StepSums(*self._summed(torch.stack(list(combine(self._sums)))))
        self.mean = total.mean_loss(self._decay)
        self.accuracy = [round(value, 4) for value in total.accuracy().tolist()]
        self._history.append(step, {"loss": self.mean, "accuracy": self.accuracy})
        self._sums = []

    def state(self) -> dict[str, torch.Tensor | float | None]:
        """What a checkpoint keeps; every rank calls it."""
        unrecorded = torch.stack(list(combine(self._sums))) if self._sums else None
        return {
            "sums": None if unrecorded is None else self._summed(unrecorded),
            "loss": self.mean,  # the final loss, if no step is left
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; its sums are those of all ranks, so rank 0 alone takes them."""
        self.mean = state.get("loss", math.nan)
        if state["sums"] is not None and self._is_main:
            self._sums = [StepSums(*state["sums"].to(self._device))]


def _not_finite(loss: float, step: int, samples: list[str]) -> OutputError:
    return OutputError(
        f"step {step}: the loss is {loss}. The step has the samples {samples}.",
        code="loss-not-finite",
        remedy="Lower train.learning_rate, or inspect the states of these samples; the "
        "last checkpoint is older than this step.",
        facts={"step": step, "samples": samples[:8]},
    )
