# SPDX-License-Identifier: Apache-2.0
"""The contract of the backends: rows of token ids in, the target's hidden states out.

Legend: T tokens of a row, A aux layers, H hidden size.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from shared.errors import UserError
from shared.target import TargetConfig
from stages.dump.config import DumpConfig
from stages.dump.spool import SHM

logger = logging.getLogger(__name__)


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


def choose(config: DumpConfig, target: TargetConfig, aux_layers: tuple[int, ...]) -> str:
    """The recipe's backend, files where it brings states; for `auto` the engine decides.

    Raises:
        UserError: `auto`, and neither vLLM nor transformers knows the target.
    """
    if config.states is not None:
        return "files"
    if config.backend != "auto":
        return config.backend
    if importlib.util.find_spec("vllm") is None:
        name, why = "hf", "vLLM is not installed here"
    else:
        _quieten_vllm()
        from stages.dump.backend_vllm import VllmCapture

        refusal = VllmCapture(**_settings(config, target, aux_layers)).refusal()
        name, why = ("hf", refusal) if refusal else ("vllm", "vLLM has hooks for this target")
    if name == "hf":
        from stages.dump.backend_hf import require_known

        require_known(target.folder, trust_remote_code=config.run.trust_remote_code, why=why)
    logger.info("backend: auto takes %s: %s", name, why)
    return name


@contextlib.contextmanager
def open_backend(
    name: str, config: DumpConfig, target: TargetConfig, aux_layers: tuple[int, ...]
) -> Iterator[Backend]:
    """Backend `name` ("vllm", "hf", "trtllm" or "files"), loaded for the length of the block.

    Raises:
        UserError: it is "trtllm", and TensorRT-LLM is not here.
    """
    if name == "files":
        from stages.dump.backend_files import StateFiles

        yield StateFiles(config, target, len(aux_layers) + 1)
        return
    settings = _settings(config, target, aux_layers)
    if name == "hf":
        from stages.dump.backend_hf import HfCapture

        with HfCapture(**settings) as hf:
            yield hf
        return
    settings["tensor_parallel"] = config.tensor_parallel_size
    settings["scratch"] = config.paths.root / "tmp"
    if name == "trtllm":
        _require_trtllm()
        from stages.dump.backend_trtllm import TrtllmCapture

        with TrtllmCapture(**settings, expert_parallel=config.expert_parallel_size) as trtllm:
            yield trtllm
        return
    _quieten_vllm()
    from stages.dump.backend_vllm import VllmCapture

    with VllmCapture(**settings, seed=config.run.seed) as vllm:
        yield vllm


def _settings(
    config: DumpConfig, target: TargetConfig, aux_layers: tuple[int, ...]
) -> dict[str, Any]:
    """What every backend takes."""
    return {
        "target": target.folder,
        "aux_layers": aux_layers,
        "num_layers": target.num_layers,
        "max_length_tokens": config.run.max_length_tokens,
        "dtype": config.dtype,
        "trust_remote_code": config.run.trust_remote_code,
        "max_num_batched_tokens": config.batch_tokens,
    }


def _require_trtllm() -> None:
    if importlib.util.find_spec("tensorrt_llm") is None:
        raise UserError(
            "backend: trtllm needs TensorRT-LLM, which is not installed here. Build the dump image on "
            "NVIDIA's (BASE_IMAGE, see stages/dump/README.md), or set backend: hf or vllm."
        )


def _quieten_vllm() -> None:
    """Read when vLLM is imported: its own progress would drown the stage's."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
