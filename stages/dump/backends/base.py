# SPDX-License-Identifier: Apache-2.0
"""The contract of the backends: rows of token ids in, the target's hidden states out.

Legend: T tokens of a row, A aux layers, H hidden size.
"""

import dataclasses
import tempfile
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from shared.errors import UserError
from stages.dump.backends.spool import SHM


class Row(NamedTuple):
    """What a backend is asked: token ids, whether it shall say their log-probabilities, a name."""

    ids: Sequence[int]
    is_probe: bool = False
    sample_id: str = ""


@dataclasses.dataclass(kw_only=True)
class CaptureSettings:
    """What every backend that loads a target is made with.

    Attributes:
        target: name or folder of the target.
        aux_layers: ids of the states to take, ascending; id i is the state entering layer i.
        num_layers: L, checked against the target.
        max_length_tokens: longest row that will be asked for.
        dtype: what the target computes in; "auto" is what its weights are stored in.
        max_num_batched_tokens: most tokens of one forward.
    """

    target: str | Path
    aux_layers: Sequence[int]
    num_layers: int
    max_length_tokens: int
    dtype: str = "auto"
    trust_remote_code: bool = False
    max_num_batched_tokens: int = 8192


@dataclasses.dataclass(kw_only=True)
class EngineSettings(CaptureSettings):
    """What a backend is made with whose engine hands states over through a spool.

    Attributes:
        tensor_parallel: GPUs that share the target.
        spool: folder to make the private spool folder in; None for /dev/shm where it has room,
            else `scratch`, a folder on a disk (None for the system's).
    """

    tensor_parallel: int = 1
    spool: Path | None = None
    scratch: Path | None = None

    def spool_parents(self) -> list[Path]:
        """Where the spool may lie, the first with room."""
        if self.spool is not None:
            return [self.spool]
        return [SHM, self.scratch or Path(tempfile.gettempdir())]

    def require_num_layers(self, found: int) -> None:
        """Refuse another target than the recipe's.

        Raises:
            UserError: it has another number of layers.
        """
        if found != self.num_layers:
            raise UserError(
                f"{self.target}: expected {self.num_layers} layers, found {found}. Set run.target "
                "to the model the recipe was made for."
            )


class Captured(NamedTuple):
    """What a backend answers.

    Attributes:
        row: its place among the rows asked, from 0.
        states: [T, A+1, H] bfloat16 on the CPU. It may be mapped from the spool: copy what you keep.
        logprobs: [T-1] float32, log p(ids[t+1] | ids[:t+1]) in nats as the backend's own model and
            sampler say it; None where the row was no probe.
    """

    row: int
    states: torch.Tensor
    logprobs: torch.Tensor | None


class Backend(Protocol):
    """A target that is loaded and answers."""

    # Whether it loses speed when a shard must be complete before the next one is begun.
    streams: bool

    def run(self, rows: Iterable[Row]) -> Generator[Captured, None, None]:
        """Every row's answer, in any order."""
        ...


def check_row(index: int, ids: Sequence[int], max_length_tokens: int) -> None:
    """Refuse what no backend can answer.

    Raises:
        UserError: the row is empty or longer than `max_length_tokens`.
    """
    if not 0 < len(ids) <= max_length_tokens:
        raise UserError(
            f"row {index}: expected 1 to {max_length_tokens} tokens, found {len(ids)}. Truncate or "
            "drop the row, or raise run.max_length_tokens."
        )
