# SPDX-License-Identifier: Apache-2.0
"""The half of capture that vLLM loads into its own processes: finished requests become files.

In: requests whose `kv_transfer_params` name a file (see `backend_vllm`). vLLM's method
`extract_hidden_states` keeps the wanted states of every prompt token in a cache layer of its own,
paged like keys and values. Out: that file in the spool, safetensors {`token_ids` int32 [T],
`hidden_states` [T, A+1, H] bf16}, written beside its name and renamed, so that a reader sees it whole
or not at all. Costs a gather on the device, a copy to the host and a write; the engine waits for
the gather alone.

The surprise: pages are zeroed once read. Should a step ever skip the capture (vLLM does so for a
batch in which a row fills its length limit), the reader finds zeros and refuses them, instead of an
earlier request's states, which would look perfectly sound.

On CUDA the host copy runs on a side stream into pinned memory. That path, unlike all else here, has
not been run: the machines that the tests run on have no GPU.

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

# The order of a page's axes changed between the releases that we support; this function knows the
# installed one's. Nothing else of vLLM's own (debugging) connector is used.
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    extract_from_kv_cache,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec, KVCacheConfig

from shared.runtime.process import worker_dies_with_parent
from stages.dump.backends.spool import FAILED_SUFFIX

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
    """What the scheduler's side tells the worker's side at each step."""

    finished: list[Finished]


class HiddenStatesConnector(KVConnectorBase_V1, SupportsHMA):
    """Saves hidden states, loads nothing. vLLM makes one for the scheduler and one per worker."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        # vLLM's processes are not told when the stage is killed, and would hold its memory.
        worker_dies_with_parent()
        self._group = _find_group(kv_cache_config)
        self._block_size = kv_cache_config.kv_cache_groups[self._group].kv_cache_spec.block_size
        self._finished: list[Finished] = []
        self._cache: torch.Tensor | None = None
        self._writers: ThreadPoolExecutor | None = None
        self._side_stream: torch.cuda.Stream | None = None

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
            self._cache = cache
            self._writers = ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="eyrie-capture")
            if cache.is_cuda:
                self._side_stream = torch.cuda.Stream()

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Read the pages of the requests that finished last step, and let them go."""
        metadata = self._get_connector_metadata()
        if not isinstance(metadata, CaptureMetadata):
            raise TypeError(f"expected CaptureMetadata, found {type(metadata).__name__}")
        # Taken, not looped over: a second call in one step must not read the zeroed pages.
        finished, metadata.finished = metadata.finished, []
        if self._cache is not None and self._writers is not None:
            for request in finished:
                host, copied = self._to_host(_take(self._cache, request, self._block_size))
                self._writers.submit(_write, request, host, copied)
        return {request.request_id for request in finished} or None, None

    def shutdown(self) -> None:
        if self._writers is not None:
            self._writers.shutdown(wait=True)

    def _to_host(self, states: torch.Tensor) -> tuple[torch.Tensor, "torch.cuda.Event | None"]:
        """`states` in host memory, and on CUDA the event that says when they have arrived."""
        if self._side_stream is None:
            return states.cpu(), None
        self._side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side_stream):
            host = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
            host.copy_(states, non_blocking=True)
            # Else the allocator would hand out the memory of `states` before the copy has run.
            states.record_stream(self._side_stream)
            copied = torch.cuda.Event()
            copied.record(self._side_stream)
        return host, copied


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


def _take(cache: torch.Tensor, request: Finished, block_size: int) -> torch.Tensor:
    """Copy the states of `request` out of its pages and zero the pages.

    Both run in the order of the current stream, so the pages may be reused as soon as this returns.

    Worked example: 16 tokens a page, pages [7, 3], T = 18: tokens 0..15 are slots 112..127, tokens
    16 and 17 are slots 48 and 49.

    Returns:
        [T, A+1, H] bf16 on the cache's device.
    """
    num_tokens = len(request.token_ids)
    blocks = torch.tensor(request.block_ids, dtype=torch.long, pin_memory=cache.is_cuda)
    blocks = blocks.to(cache.device, non_blocking=True)
    tokens = torch.arange(num_tokens, device=cache.device)
    slots = blocks[tokens // block_size] * block_size + tokens % block_size  # [T]
    states = extract_from_kv_cache(cache, slots, num_tokens).to(torch.bfloat16)  # [T, A+1, H]
    cache.index_fill_(0, blocks, 0)
    return states


def _write(request: Finished, states: torch.Tensor, copied: "torch.cuda.Event | None") -> None:
    """Write one file, whole or not at all. Runs on a writer thread."""
    path = Path(request.write_to)
    partial = path.with_suffix(".partial")
    try:
        if copied is not None:
            copied.synchronize()
        token_ids = torch.tensor(request.token_ids, dtype=torch.int32)
        save_file({"token_ids": token_ids, "hidden_states": states.contiguous()}, partial)
        partial.replace(path)
    except (OSError, RuntimeError, SafetensorError):
        # It would vanish in the pool, and the driver wait for a file that never comes.
        logger.exception("could not write the hidden states to %s", path)
        path.with_suffix(FAILED_SUFFIX).touch()
