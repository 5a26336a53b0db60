# SPDX-License-Identifier: Apache-2.0
"""Hidden states that were made elsewhere, as a backend: read, brought to our convention, passed on.

In: one file per conversation, ModelOpt's or speculators' (`shared/contracts/row_files.py`). Out: what
an engine would answer, so that checks, plan, shards and resuming are the same. Cost: reading them.

No such file says whether its final state is before or after the target's final norm, and both are
in use. The states show it: divided by the norm's weight, a normed state has a root mean square of 1
at every token. A normed state is divided by the weight for good: the norm of y / w is y again, so
the target's logits are the same from either.

Legend: T tokens of a row, A aux layers, H hidden size.
"""

import logging
from collections.abc import Generator, Iterable

import torch

from shared.contracts.row_files import RowFile
from shared.errors import UserError
from shared.paths import require_input
from shared.target.model import TargetConfig
from shared.target.tensors import FinalNorm, read_tensors
from stages.dump.backends.base import Captured, Row
from stages.dump.config import DumpConfig
from stages.dump.sources import state_files

_FILES_SAMPLED = 16
# Fewer states may have a root mean square of 1 by chance.
_MIN_TOKENS = 8
# bfloat16 rounds each entry by up to 0.4 %, so the mean of many squares by far less.
_NORMED_WITHIN = 0.02

logger = logging.getLogger(__name__)


class StateFiles:
    """The files of `dump.states`.

    Raises:
        UserError: some final states are normed and others are not.
    """

    streams = False

    def __init__(self, config: DumpConfig, target: TargetConfig, num_states: int) -> None:
        self.folder = require_input(str(config.states), config.workspace, label="dump.states")
        self._num_states = num_states
        self._hidden_size = target.hidden_size
        self._norm = read_tensors(target).norm
        self._example: dict[bool, str] = {}  # is normed -> the first file that shows it
        self._sample_convention()
        order = "after" if self._is_normed else "before"
        logger.info("%s: the final states were taken %s the final norm", self.folder, order)

    def run(self, rows: Iterable[Row]) -> Generator[Captured, None, None]:
        """Every row's states, in order. States that are no states pass: the checks fail their row.

        Raises:
            UserError: a file changed since the plan was made, or has the other norm convention.
        """
        for index, row in enumerate(rows):
            file = self._file(row.sample_id)
            length = len(row.ids)
            if file.input_ids[:length].tolist() != list(row.ids):
                raise UserError(
                    f"{file.path} holds other tokens than when the rows were planned.",
                    code="states-changed",
                    remedy="Restore the file, or run dump again with --overwrite.",
                    facts={"file": str(file.path)},
                )
            states = file.hidden_states[:length]
            self._note_convention(row.sample_id, states[:, -1])
            if self._is_normed:
                states = states.clone()
                states[:, -1] = self._norm.unscaled(states[:, -1]).to(states.dtype)
            yield Captured(index, states, None)

    def _file(self, name: str) -> RowFile:
        return RowFile(self.folder / f"{name}.pt", self._num_states, self._hidden_size)

    def _sample_convention(self) -> None:
        """Note the convention of the first files that can be read."""
        sampled = 0
        for path in state_files(self.folder):
            name = path.relative_to(self.folder).with_suffix("").as_posix()
            try:
                final = self._file(name).hidden_states[:, -1]
            except UserError:  # accounted for when the rows were planned
                continue
            sampled += self._note_convention(name, final)
            if sampled == _FILES_SAMPLED:
                return

    @property
    def _is_normed(self) -> bool:
        return True in self._example

    def _note_convention(self, name: str, final: torch.Tensor) -> bool:
        """Whether final states [T, H] show their convention: enough of them, finite, not zero.

        Raises:
            UserError: an earlier file showed the other convention.
        """
        is_sound = bool(final.isfinite().all()) and bool(final.any(dim=-1).all())
        if len(final) < _MIN_TOKENS or not is_sound:
            return False
        normed = is_normed(final, self._norm)
        self._example.setdefault(normed, name)
        if len(self._example) == 2:
            raise UserError(
                f"{self.folder}: the final states of {self._example[True]} were taken after the "
                f"target's final norm, those of {self._example[False]} before it.",
                code="states-mixed-norm",
                remedy="Put the two kinds into folders of their own.",
                facts={"normed": self._example[True], "not_normed": self._example[False]},
            )
        return True


def is_normed(final: torch.Tensor, norm: FinalNorm) -> bool:
    """Whether states [T, H] were normed with `norm`: without weight w, their mean square is 1.

    Worked example, w = [2, 0.5]: x = [3, 4] normed is w * x / sqrt(12.5) = [1.70, 0.57], and
    [0.85, 1.13] = y / w has the mean square (0.72 + 1.28) / 2 = 1. x / w = [1.5, 8] has 33.
    """
    # An entry whose weight is almost zero shows nothing.
    weight = norm.weight.float().abs()
    unit = norm.unscaled(final)[:, weight > 1e-3 * weight.max()]
    size = unit.square().mean(-1).sqrt()
    return bool(((size - 1).abs() < _NORMED_WITHIN).all())
