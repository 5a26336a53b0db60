# SPDX-License-Identifier: Apache-2.0
"""Before a vLLM engine captures: is this vLLM, this target, this machine able to?

All of it is asked before a weight is loaded, so that a refusal costs seconds.
"""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import vllm
from vllm import EngineArgs
from vllm.config import VllmConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.platforms import current_platform

from shared.errors import RetryableError, UserError
from shared.vllm.versions import SUPPORTED_VLLM, is_within
from stages.dump.backends.base import EngineSettings

# vLLM takes no states at all from a step in which a row fills its limit: the limit is one higher.
HEADROOM_TOKENS = 1
MAX_ROWS_A_STEP = 256

logger = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class VllmSettings(EngineSettings):
    """What an engine for capture is started with; rows longer than a step are prefilled in chunks."""

    seed: int = 0

    def resolve(self) -> VllmConfig:
        """The configuration for capture, as vLLM resolves it.

        Raises:
            UserError: vLLM refuses it, or has no hooks for this target.
            RetryableError: the target could not be fetched.
        """
        prepare_environment()
        try:
            config = self._resolve()
        except ValueError as error:
            raise UserError(f"vLLM {vllm.__version__} refuses {self.target}: {error}") from error
        except OSError as error:
            kind = UserError if Path(self.target).exists() else RetryableError
            raise kind(f"could not load {self.target}: {error}") from error
        self._check_target(config)
        return config

    def refusal(self) -> str | None:
        """Why vLLM cannot capture this target, or None: what `backend: auto` asks.

        Raises:
            RetryableError: the target could not be fetched.
        """
        try:
            check_version(vllm.__version__)
            self.resolve()
        except UserError as error:
            return str(error)
        return None

    def _resolve(self) -> VllmConfig:
        try:
            return self._arguments(HEADROOM_TOKENS).create_engine_config()
        except ValueError:
            # Perhaps only for the headroom, where rows go up to the target's own limit. No token
            # is ever computed at that position, so vLLM may be told to let it pass.
            self._arguments(0).create_engine_config()
            os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
            return self._arguments(HEADROOM_TOKENS).create_engine_config()

    def _arguments(self, headroom_tokens: int) -> EngineArgs:
        layer_ids = [*self.aux_layers, self.num_layers]
        speculative: dict[str, Any] = {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layer_ids}},
        }
        return EngineArgs(
            model=str(self.target),
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            tensor_parallel_size=self.tensor_parallel,
            max_model_len=self.max_length_tokens + headroom_tokens,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=min(MAX_ROWS_A_STEP, self.max_num_batched_tokens),
            enforce_eager=current_platform.is_cpu(),
            # A row whose prefix is found in a cache comes back short by it.
            enable_prefix_caching=False,
            seed=self.seed,
            speculative_config=speculative,
            kv_transfer_config={
                "kv_connector": "HiddenStatesConnector",
                "kv_connector_module_path": "stages.dump.backends.vllm.connector",
                "kv_role": "kv_producer",
            },
        )

    def _check_target(self, config: VllmConfig) -> None:
        model = config.model_config
        self.require_num_layers(model.get_total_num_hidden_layers())
        model_class, architecture = ModelRegistry.resolve_model_cls(model.architectures, model)
        if model.use_mla:
            raise UserError(
                f"vLLM {vllm.__version__} cannot hand out the hidden states of {architecture} "
                f"({self.target}): its attention is latent (MLA). Set backend: hf in the recipe's "
                "dump section."
            )
        if not supports_eagle3(model_class):
            raise UserError(
                f"vLLM {vllm.__version__} cannot hand out the hidden states of {architecture} "
                f"({self.target}): its model has no hooks. Set backend: hf in the recipe's dump "
                "section."
            )


def check_version(found: str) -> None:
    """Refuse a vLLM whose capture was never tried.

    Raises:
        UserError: naming the version found and the versions supported.
    """
    if not is_within(found, SUPPORTED_VLLM):
        raise UserError(
            f"this stage captures with vLLM {SUPPORTED_VLLM}, found vLLM {found}. Build the dump "
            "image with DUMP_VLLM_VERSION set to one of those, or set backend: hf."
        )


def prepare_environment() -> None:
    """What vLLM's processes inherit: where our connector is, how much to say, how much to take."""
    source_root = str(Path(__file__).resolve().parents[4])
    search = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if source_root not in search:
        os.environ["PYTHONPATH"] = os.pathsep.join([source_root, *filter(None, search)])
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
