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
from stages.dump.backends.stats import Stats


class Row(NamedTuple):
    """One request: token ids, whether to return their log-probabilities too, and a name."""

    ids: Sequence[int]
    is_probe: bool = False
    sample_id: str = ""


class Captured(NamedTuple):
    """One answer.

    Attributes:
        row: index of the row among the requested ones, from 0.
        states: [T, A+1, H] bfloat16 on the CPU. It may be mapped from the spool: copy what you keep.
        logprobs: [T-1] float32, log p(ids[t+1] | ids[:t+1]) in nats by the backend's own model and
            sampler; None where the row is no probe, or the backend reports no log-probabilities.
        stats: of the states, where the backend measured them already.
    """

    row: int
    states: torch.Tensor
    logprobs: torch.Tensor | None
    stats: Stats | None = None


class Backend(Protocol):
    """A loaded target that answers rows."""

    # Whether it loses speed when a shard must be complete before the next one is begun.
    streams: bool

    def run(self, rows: Iterable[Row]) -> Generator[Captured, None, None]:
        """Every row's answer, in any order."""
        ...


@dataclasses.dataclass(kw_only=True)
class CaptureSettings:
    """What every backend needs that loads a target.

    Attributes:
        target: name or folder of the target.
        aux_layers: ids of the states to capture, ascending; id i is the state entering layer i.
        num_layers: L, checked against the target.
        max_length_tokens: longest row that will be requested.
        dtype: what the target computes in; "auto" is what its weights are stored in.
        max_num_batched_tokens: most tokens of one forward pass.
    """

    target: str | Path
    aux_layers: Sequence[int]
    num_layers: int
    max_length_tokens: int
    dtype: str = "auto"
    trust_remote_code: bool = False
    max_num_batched_tokens: int = 8192

    def require_num_layers(self, num_layers: int) -> None:
        """Refuse another target than the recipe's.

        Raises:
            UserError: it has another number of layers.
        """
        if num_layers != self.num_layers:
            raise UserError(
                f"{self.target}: expected {self.num_layers} layers, found {num_layers}.",
                code="target-layers",
                remedy="Set run.target to the model that the recipe was made for.",
                facts={"expected": self.num_layers, "found": num_layers},
            )

    def require_length(self, index: int, ids: Sequence[int]) -> None:
        """Refuse a row that no backend can answer.

        Raises:
            UserError: the row is empty or longer than `max_length_tokens`.
        """
        if not 0 < len(ids) <= self.max_length_tokens:
            raise UserError(
                f"row {index}: expected 1 to {self.max_length_tokens} tokens, found {len(ids)}.",
                code="row-length",
                remedy="Truncate or drop the row, or raise run.max_length_tokens.",
                facts={"row": index, "tokens": len(ids)},
            )

    def unsupported(self, engine: str, model: str, reason: str) -> UserError:
        """The error for an engine that cannot hand out the states of this model."""
        return UserError(
            f"{engine} cannot hand out the hidden states of {model} ({self.target}): {reason}.",
            code="no-hooks",
            remedy="Set backend: hf in the recipe's section dump.",
            facts={"engine": engine, "model": model},
        )


@dataclasses.dataclass(kw_only=True)
class EngineSettings(CaptureSettings):
    """What a backend needs whose engine hands states over through a spool.

    Attributes:
        tensor_parallel: GPUs that share the target.
        spool: folder to make the private spool folder in; None for /dev/shm where it has room,
            else `scratch`, a folder on a disk (None for the system's).
        spool_sharers: engines on this node that use /dev/shm together, this one included.
    """

    tensor_parallel: int = 1
    spool: Path | None = None
    scratch: Path | None = None
    spool_sharers: int = 1

    def spool_parents(self) -> list[Path]:
        """Folders for the spool; the first one with room is used."""
        if self.spool is not None:
            return [self.spool]
        return [SHM, self.scratch or Path(tempfile.gettempdir())]
