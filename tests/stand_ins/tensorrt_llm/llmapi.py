# SPDX-License-Identifier: Apache-2.0
"""The arguments of TensorRT-LLM that capture gives, and what its own classes make of them."""

from typing import Any

import pydantic


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class KvCacheConfig(Strict):
    enable_block_reuse: bool = True
    free_gpu_memory_fraction: float = 0.9


class SaveHiddenStatesDecodingConfig(Strict):
    """As in 1.2, the set gains -1 where it has none, and files leave that column out again."""

    output_directory: str
    write_interval: int = 20
    file_prefix: str = "data"
    eagle3_layers_to_capture: set[int] | None = None
    max_draft_len: int | None = None

    _last_hidden_in_save: bool = pydantic.PrivateAttr(default=True)

    def model_post_init(self, _: Any) -> None:
        assert self.eagle3_layers_to_capture, "the stand-in has no default layers"
        self._last_hidden_in_save = -1 in self.eagle3_layers_to_capture
        self.eagle3_layers_to_capture.add(-1)


class LlmArgs(Strict):
    model: str
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    moe_expert_parallel_size: int | None = None
    max_batch_size: int | None = 2048
    max_seq_len: int | None = None
    max_num_tokens: int | None = 8192
    enable_chunked_prefill: bool = False
    disable_overlap_scheduler: bool = False
    cuda_graph_config: dict[str, Any] | None = pydantic.Field(default_factory=dict)
    kv_cache_config: KvCacheConfig = pydantic.Field(default_factory=KvCacheConfig)
    speculative_config: SaveHiddenStatesDecodingConfig

    def save_one_at_a_time(self) -> None:
        """What the real class does to its other arguments when states are saved."""
        self.max_batch_size = 1
        self.disable_overlap_scheduler = True
        self.cuda_graph_config = None
        self.speculative_config.max_draft_len = 1
