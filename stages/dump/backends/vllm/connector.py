# SPDX-License-Identifier: Apache-2.0
"""The half of capture that vLLM loads into its own processes: finished requests become files.

In: requests whose `kv_transfer_params` name a file (see `capture`). vLLM's method
`extract_hidden_states` keeps the wanted states of every prompt token in a cache layer of its own,
paged like keys and values. Out: that file in the spool, safetensors {`token_ids` int32 [T],
`hidden_states` [T, A+1, H] bf16, and the states' `Stats`}, written beside its name and renamed, so
that a reader sees it whole or not at all. Cost: `pages` for the copy, then a write on threads of its
own.

vLLM's two model runners call this class differently. V1 calls `get_finished`, V2 (the default on
CUDA) `get_transfer_results`, which the base class forwards to `get_finished`; both in the step after
a request has finished.

Shapes: T tokens of one request, A+1 aux layers and the final state, H hidden.
"""

import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec, KVCacheConfig

from shared.runtime.process import worker_dies_with_parent
from stages.dump.backends.spool import FAILED_SUFFIX
from stages.dump.backends.vllm.pages import PageReader, Taken

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

# The key in a request's kv_transfer_params that holds the path of its file.
WRITE_TO = "eyrie_write_to"
# tmpfs takes about 2 GB/s from one thread; four keep up with the fastest prefill.
NUM_WRITERS = 4


@dataclasses.dataclass
class Finished:
    """A request whose states lie complete in the cache, not yet read."""

    request_id: str
    write_to: str
    token_ids: list[int]
    block_ids: list[int]


@dataclasses.dataclass
class CaptureMetadata(KVConnectorMetadata):
    """What the scheduler's side sends to the worker's side at each step."""

    finished: list[Finished]


class HiddenStatesConnector(KVConnectorBase_V1, SupportsHMA):
    """Saves hidden states, loads nothing. vLLM makes one for the scheduler and one per worker."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        # Nothing tells vLLM's processes that the stage was killed; they would hold its memory.
        worker_dies_with_parent()
        self._group = _find_group(kv_cache_config)
        self._block_size = kv_cache_config.kv_cache_groups[self._group].kv_cache_spec.block_size
        self._finished: list[Finished] = []
        self._reader: PageReader | None = None
        self._writers: ThreadPoolExecutor | None = None

    # The scheduler's side.

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, *args: Any, **kwargs: Any) -> None:
        return

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Note a finished request. True keeps its pages until `get_finished` has read them."""
        write_to = (request.kv_transfer_params or {}).get(WRITE_TO)
        aborted = request.num_computed_tokens < request.num_prompt_tokens
        if write_to is None or aborted or request.prompt_token_ids is None:
            return False, None
        self._finished.append(
            Finished(
                request_id=request.request_id,
                write_to=write_to,
                token_ids=list(request.prompt_token_ids),
                block_ids=list(block_ids[self._group]),
            )
        )
        return True, None

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> CaptureMetadata:
        finished, self._finished = self._finished, []
        return CaptureMetadata(finished)

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layers = get_layers_from_vllm_config(
            self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches)
        )
        if len(layers) != 1:
            raise ValueError(f"expected one layer of hidden states, found {sorted(layers)}")
        cache = kv_caches[next(iter(layers))]
        if self._block_size not in cache.shape[1:3]:
            raise ValueError(
                f"the cache of hidden states has pages of shape {tuple(cache.shape[1:])}, expected "
                f"{self._block_size} tokens a page; reads would hit the wrong tokens"
            )
        # Every rank holds the same states; one writes them.
        if get_tensor_model_parallel_rank() == 0:
            self._reader = PageReader(cache, self._block_size)
            self._writers = ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="eyrie-capture")

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Read the pages of the requests that finished last step, and release them."""
        metadata = self._get_connector_metadata()
        if not isinstance(metadata, CaptureMetadata):
            raise TypeError(f"expected CaptureMetadata, found {type(metadata).__name__}")
        # Taken, not looped over: a second call in one step must not read the zeroed pages.
        finished, metadata.finished = metadata.finished, []
        if self._reader is not None and self._writers is not None:
            for request in finished:
                taken = self._reader.take(request.block_ids, len(request.token_ids))
                self._writers.submit(_write, request, taken)
        return {request.request_id for request in finished} or None, None

    def shutdown(self) -> None:
        if self._writers is not None:
            self._writers.shutdown(wait=True)


def _find_group(config: KVCacheConfig) -> int:
    """Index of the cache group, that is of the block table, that the states are paged by.

    A target with one kind of attention has one table for everything; otherwise the states have
    one of their own.
    """
    groups = config.kv_cache_groups
    own = [i for i, g in enumerate(groups) if isinstance(g.kv_cache_spec, HiddenStateCacheSpec)]
    if len(own) == 1:
        return own[0]
    if not own and len(groups) == 1:
        return 0
    raise ValueError(
        f"expected one cache group of hidden states, found {len(own)} among {len(groups)}; targets "
        "with latent attention (MLA) cannot be captured"
    )


def _write(request: Finished, taken: Taken) -> None:
    """Write one file, whole or not at all. Runs on a writer thread."""
    path = Path(request.write_to)
    partial = path.with_suffix(".partial")
    try:
        taken.wait()
        tensors = {
            "token_ids": torch.tensor(request.token_ids, dtype=torch.int32),
            "hidden_states": taken.states,
            **taken.stats._asdict(),
        }
        save_file(tensors, partial)
        partial.replace(path)
    except (OSError, RuntimeError, SafetensorError):
        # The pool would swallow it, and the driver wait for a file that never comes.
        logger.exception("could not write the hidden states to %s", path)
        path.with_suffix(FAILED_SUFFIX).touch()
