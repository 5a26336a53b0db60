# SPDX-License-Identifier: Apache-2.0
"""Which backend a recipe means, and that backend opened."""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import Any

from shared.errors import UserError
from shared.target.model import TargetConfig
from shared.target.precision import compute_dtype
from stages.dump.backends.base import Backend
from stages.dump.config import DumpConfig

logger = logging.getLogger(__name__)


def choose(config: DumpConfig, target: TargetConfig, aux_layers: tuple[int, ...]) -> str:
    """The recipe's backend; `files` where the recipe brings states; with `auto`, vLLM decides.

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
        from stages.dump.backends.vllm.capture import VllmCapture

        settings = _settings(config, target, aux_layers)
        refusal = VllmCapture(**settings, engine_args=config.engine_args).refusal()
        name, why = ("hf", refusal) if refusal else ("vllm", "vLLM has hooks for this target")
    if name == "hf":
        from stages.dump.backends.hf import require_known

        require_known(target, why=why)
    logger.info("backend: auto takes %s: %s", name, why)
    return name


@contextlib.contextmanager
def open_backend(
    name: str, config: DumpConfig, target: TargetConfig, aux_layers: tuple[int, ...]
) -> Iterator[Backend]:
    """Backend `name` ("vllm", "hf", "trtllm" or "files"), loaded for the length of the block.

    Raises:
        UserError: it is "trtllm", and TensorRT-LLM is not installed.
    """
    if name == "files":
        from stages.dump.backends.files import StateFiles

        yield StateFiles(config, target, len(aux_layers) + 1)
        return
    settings = _settings(config, target, aux_layers)
    logger.info(
        "starting backend %s for %s: usually about a minute; a large target takes longer",
        name,
        target.folder,
    )
    if name == "hf":
        from stages.dump.backends.hf import HfCapture

        with HfCapture(**settings) as hf:
            yield hf
        return
    settings["tensor_parallel"] = config.tensor_parallel_size
    settings["scratch"] = config.paths.root / "tmp"
    settings["spool_sharers"] = config.engines_on_node
    if name == "trtllm":
        _require_trtllm()
        from stages.dump.backends.trtllm.capture import TrtllmCapture

        with TrtllmCapture(**settings, expert_parallel=config.expert_parallel_size) as trtllm:
            yield trtllm
        return
    _quieten_vllm()
    from stages.dump.backends.vllm.capture import VllmCapture

    settings |= {"seed": config.run.seed, "engine_args": config.engine_args}
    with VllmCapture(**settings) as vllm:
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
        "dtype": compute_dtype(config.dtype, target),
        "trust_remote_code": config.run.trust_remote_code,
        "max_num_batched_tokens": config.batch_tokens,
    }


def _require_trtllm() -> None:
    if importlib.util.find_spec("tensorrt_llm") is None:
        raise UserError(
            "backend: trtllm needs TensorRT-LLM, which is not installed here.",
            code="trtllm-not-installed",
            remedy="Build the dump image on NVIDIA's (BASE_IMAGE, see stages/dump/README.md), or set "
            "backend: hf or vllm.",
        )


def _quieten_vllm() -> None:
    """Silence what vLLM logs of its own progress; it reads these variables when it is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
