# SPDX-License-Identifier: Apache-2.0
"""Before a vLLM engine captures: can this vLLM, this target, this machine do it?

All of it is checked before a weight is loaded, so that a refusal costs seconds.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vllm
from vllm import EngineArgs
from vllm.config import VllmConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.platforms import current_platform

from shared.errors import RetryableError, UserError, nearest
from shared.vllm.cpu import ONE_PROCESS_EXECUTOR, starts_in_one_process
from shared.vllm.versions import SUPPORTED_VLLM, is_within
from stages.dump.backends.base import EngineSettings

# vLLM captures nothing in a step in which a row fills its limit: the limit is one higher.
HEADROOM_TOKENS = 1
MAX_ROWS_A_STEP = 256
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class VllmSettings(EngineSettings):
    """What an engine for capture is started with; rows longer than a step are prefilled in chunks.

    Attributes:
        engine_args: more of vLLM's EngineArgs by their own names, over what is set here.
    """

    seed: int = 0
    engine_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def resolve(self) -> VllmConfig:
        """The configuration for capture, as vLLM resolves it.

        Raises:
            UserError: vLLM refuses it, or has no hooks for this target.
            RetryableError: the target could not be fetched.
        """
        self._check_engine_args()
        prepare_environment()
        try:
            config = self._resolve()
        except (ValueError, NotImplementedError) as error:
            raise UserError(
                f"vLLM {vllm.__version__} refuses {self.target}: {error}",
                code="engine-config-refused",
                remedy="Change the setting that vLLM names, or set backend: hf.",
                facts={"target": str(self.target)},
            ) from error
        except OSError as error:
            kind = UserError if Path(self.target).exists() else RetryableError
            raise kind(
                f"could not load {self.target}: {error}",
                code="target-not-loadable",
                remedy="Check run.target; if it is on a hub, check the network and try again.",
                facts={"target": str(self.target)},
            ) from error
        self._check_target(config)
        return config

    def refusal(self) -> str | None:
        """Why vLLM cannot capture this target, or None: what `backend: auto` needs to know.

        Raises:
            RetryableError: the target could not be fetched.
        """
        try:
            check_version(vllm.__version__)
            self.resolve()
        except UserError as error:
            return str(error)
        return None

    def _check_engine_args(self) -> None:
        known = EngineArgs.__dataclass_fields__.keys()
        unknown = sorted(self.engine_args.keys() - known)
        if unknown:
            raise UserError(
                f"dump.engine_args: expected options of vLLM {vllm.__version__}, found {unknown}.",
                code="engine-args-unknown",
                remedy=nearest(unknown[0], known) if len(unknown) == 1 else "Remove them.",
                facts={"unknown": unknown},
            )

    def _resolve(self) -> VllmConfig:
        try:
            return self._arguments(HEADROOM_TOKENS).create_engine_config()
        except ValueError:
            # Perhaps only for the headroom, where rows go up to the target's own limit. No token
            # is ever computed at that position, so vLLM may be told to allow it.
            self._arguments(0).create_engine_config()
            os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
            return self._arguments(HEADROOM_TOKENS).create_engine_config()

    def _arguments(self, headroom_tokens: int) -> EngineArgs:
        layer_ids = [*self.aux_layers, self.num_layers]
        arguments: dict[str, Any] = {
            "model": str(self.target),
            "dtype": self.dtype,
            "trust_remote_code": self.trust_remote_code,
            "tensor_parallel_size": self.tensor_parallel,
            "max_model_len": self.max_length_tokens + headroom_tokens,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_num_seqs": min(MAX_ROWS_A_STEP, self.max_num_batched_tokens),
            # A row whose prefix is found in a cache comes back without those tokens.
            "enable_prefix_caching": False,
            "seed": self.seed,
            "speculative_config": {
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {
                    "hf_config": {"eagle_aux_hidden_state_layer_ids": layer_ids}
                },
            },
            "kv_transfer_config": {
                "kv_connector": "HiddenStatesConnector",
                "kv_connector_module_path": "stages.dump.backends.vllm.connector",
                "kv_role": "kv_producer",
            },
        }
        if current_platform.is_cpu():
            arguments["enforce_eager"] = True
            ranks = (self.tensor_parallel, self.engine_args.get("pipeline_parallel_size"))
            if starts_in_one_process(ranks, os.environ):
                arguments["distributed_executor_backend"] = ONE_PROCESS_EXECUTOR
        else:
            # One token is decoded per row: graphs for decoding would be captured for nothing.
            arguments["compilation_config"] = {"cudagraph_mode": "NONE"}
        return EngineArgs(**(arguments | dict(self.engine_args)))

    def _check_target(self, config: VllmConfig) -> None:
        model = config.model_config
        self.require_num_layers(model.get_total_num_hidden_layers())
        model_class, architecture = ModelRegistry.resolve_model_cls(model.architectures, model)
        engine = f"vLLM {vllm.__version__}"
        if model.use_mla:
            raise self.unsupported(engine, architecture, "its attention is latent (MLA)")
        if not supports_eagle3(model_class):
            raise self.unsupported(engine, architecture, "its model has no hooks")


def check_version(version: str) -> None:
    """Refuse a vLLM whose capture was never tried.

    Raises:
        UserError: naming the version found and the supported ones.
    """
    if not is_within(version, SUPPORTED_VLLM):
        raise UserError(
            f"this stage captures with vLLM {SUPPORTED_VLLM}, found vLLM {version}.",
            code="engine-version",
            remedy="Build the dump image with DUMP_VLLM_VERSION set to one of those, or set "
            "backend: hf.",
            facts={"supported": SUPPORTED_VLLM, "found": version},
        )


def prepare_environment() -> None:
    """Set what vLLM's processes inherit: module path, log level, start method, memory."""
    source_root = str(Path(__file__).resolve().parents[4])
    search = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if source_root not in search:
        os.environ["PYTHONPATH"] = os.pathsep.join([source_root, *filter(None, search)])
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    # A forked engine inherits locks that this process's threads hold, and hangs at the first one.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    for variable in ALLOCATOR_VARIABLES:
        _drop_expandable_segments(variable)
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def _drop_expandable_segments(variable: str) -> None:
    """Remove an allocator option that vLLM refuses beside any connector; it helps training alone."""
    if variable not in os.environ:
        return
    options = os.environ[variable].split(",")
    kept = [option for option in options if not option.strip().startswith("expandable_segments")]
    if len(kept) < len(options):
        logger.warning("%s: dump leaves out expandable_segments, which is for training", variable)
        os.environ[variable] = ",".join(kept)
    if not kept:
        del os.environ[variable]
