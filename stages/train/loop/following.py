# SPDX-License-Identifier: Apache-2.0
"""The loop's side of `train.follow`: when to save for dump's sake, and what dump is told then.

Without `train.follow` every method does nothing.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from accelerate import Accelerator

from shared.errors import RetryableError, Stopped
from shared.runtime.status import Status
from stages.train.data.dataset import Dataset, Sample
from stages.train.data.followed import Visits


class Following:
    """A training that may follow a dump.

    Args:
        steps: the samples of every step.
        folder: train's, where dump looks for `reading.json`.
    """

    def __init__(
        self,
        dataset: Dataset,
        steps: Iterable[list[Sample]],
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        self._followed, self._folder, self._accelerator = dataset.followed, folder, accelerator
        self._visits: Visits | None = None
        self._saved_step = 0
        if self._followed:
            held_out = (sample.shard for sample in dataset.held_out)
            self._visits = Visits(steps, held_out, self._followed.window_shards)

    def is_due(self, step: int) -> bool:
        """Whether dump waits for a checkpoint, or soon would; the same on all ranks."""
        return self._visits is not None and self._visits.frees(self._saved_step, step)

    def saving(self, step: int) -> None:
        """A checkpoint of `step` is being written."""
        self._saved_step = step

    def saved(self, step: int) -> None:
        """A checkpoint of `step` is on the disk: rank 0 tells dump."""
        if self._visits and self._followed and self._accelerator.is_main_process:
            self._visits.reading(step, self._followed.fingerprint).write(self._folder)

    def finished(self) -> None:
        """The training has ended, maybe before its last step: dump need not make what is left."""
        if self._visits and self._followed and self._accelerator.is_main_process:
            done = self._visits.reading(-1, self._followed.fingerprint)
            done.write(self._folder)

    def resumed(self, step: int) -> None:
        """The checkpoint of `step`, or none if it is 0, is where the training continues."""
        self.saving(step)
        self.saved(step)

    def tell(self, status: Status, step: int, total: int) -> None:
        """Show in the status that the next step waits for a shard."""
        if self._followed and self._followed.waits_for is not None:
            facts = {"waits_for": "dump", "shard": self._followed.waits_for}
            status.progress(step, total, "steps", **facts)

    @contextlib.contextmanager
    def waiting(self, save: Callable[[], None]) -> Iterator[None]:
        """The block of the loop: what ends it while it waits for a shard loses no step."""
        try:
            yield
        except (Stopped, RetryableError):
            # Several ranks cannot agree on a save here; they continue from the last one.
            if self._visits and self._accelerator.num_processes == 1:
                save()
            raise
        finally:
            if self._followed:
                self._followed.close()
