# SPDX-License-Identifier: Apache-2.0
"""Hidden states that were made elsewhere, as a backend: read, brought to our convention, handed on.

In: a file a conversation, ModelOpt's or speculators' (`shared/contracts/row_files.py`). Out: what an engine
would answer, so that every check, the plan, the shards and the resume are the same. Cost: the disk's.
The surprise: no peer says whether its final state is before or after the target's final norm, and
both are in use. It shows: divided by the norm's weight, a normed state has a root mean square of 1 at
every token. Such a state is divided for good: the norm of y / w is y again, so that the target's
logits come out the same from either.

Legend: T tokens of a row, A aux layers, H hidden size.
"""

import logging
from collections.abc import Generator, Iterable

import torch

from shared.contracts.row_files import RowFile
from shared.errors import UserError
from shared.paths import require_input
from shared.target import model as targets
from shared.target.model import TargetConfig
from stages.dump.backends.base import Captured, Row
from stages.dump.config import DumpConfig
from stages.dump.sources import state_files

_FILES_ASKED = 16
# bfloat16 rounds each entry by up to 0.4 %, so the mean of many squares by far less.
_NORMED_WITHIN = 0.02

logger = logging.getLogger(__name__)


class StateFiles:
    """The files of `dump.states`.

    Raises:
        UserError: the files disagree on whether the final state is normed.
    """

    streams = False

    def __init__(self, config: DumpConfig, target: TargetConfig, num_states: int) -> None:
        self.folder = require_input(str(config.states), config.workspace, label="dump.states")
        self._num_states = num_states
        self._hidden_size = target.hidden_size
        self._norm_weight = targets.read_tensors(target).norm_weight.float()  # [H]
        self.is_normed = self._find_convention()
        order = "after" if self.is_normed else "before"
        logger.info("%s: the final states were taken %s the final norm", self.folder, order)

    def run(self, rows: Iterable[Row]) -> Generator[Captured, None, None]:
        """Every row's states, in order.

        Raises:
            UserError: a file changed since the plan was made.
        """
        for index, row in enumerate(rows):
            file = self._file(row.sample_id)
            length = len(row.ids)
            if file.input_ids[:length].tolist() != list(row.ids):
                raise UserError(
                    f"{file.path} holds other tokens than when the rows were planned. Restore it, "
                    "or run dump again with --overwrite."
                )
            states = file.hidden_states[:length]
            if self.is_normed:
                states = states.clone()
                states[:, -1] = (states[:, -1].float() / self._norm_weight).to(states.dtype)
            yield Captured(index, states, None)

    def _file(self, name: str) -> RowFile:
        return RowFile(self.folder / f"{name}.pt", self._num_states, self._hidden_size)

    def _find_convention(self) -> bool:
        """Whether the final states are normed, from the first files that can be read."""
        found: dict[bool, str] = {}
        for path in state_files(self.folder)[:_FILES_ASKED]:
            name = path.relative_to(self.folder).with_suffix("").as_posix()
            try:
                final = self._file(name).hidden_states[:, -1]
            except UserError:  # accounted for when the rows were planned
                continue
            found[is_normed(final, self._norm_weight)] = name
        if len(found) == 2:
            raise UserError(
                f"{self.folder}: the final states of {found[True]} were taken after the target's "
                f"final norm, those of {found[False]} before it. Keep them in folders of their own."
            )
        return True in found


def is_normed(final: torch.Tensor, norm_weight: torch.Tensor) -> bool:
    """Whether states [T, H] are RMS-normed with `norm_weight` [H]: y / w has a mean square of 1.

    Worked example, w = [2, 0.5]: x = [3, 4] normed is w * x / sqrt(12.5) = [1.70, 0.57], and
    [0.85, 1.13] = y / w has the mean square (0.72 + 1.28) / 2 = 1. x / w = [1.5, 8] has 33.
    """
    # Entries whose weight is next to nothing say nothing.
    kept = norm_weight.abs() > 1e-3 * norm_weight.abs().max()
    unit = final.float()[:, kept] / norm_weight[kept]
    size = unit.square().mean(-1).sqrt()
    return bool(((size - 1).abs() < _NORMED_WITHIN).all())
