# SPDX-License-Identifier: Apache-2.0
"""What a TensorRT-LLM engine is started with for a capture, and what its failures mean.

**Layer ids.** Ours are boundaries: id i is the state entering layer i, id L the final state before
the norm. TensorRT-LLM names the layer whose output it takes, so our id i is its i - 1. It takes a
layer's output as hidden + residual, ahead of the norm that follows, for the last layer too: the
final state before the norm is its L - 1. Its -1 is the state *after* the final norm, so our id 0,
the embedding, which would be -1 too, cannot be had.

Worked example, L = 8, aux layers (2, 4, 5): asked for are the outputs of 1, 3, 4 and 7. A file
holds them side by side in ascending order, `aux_hidden_states` [T, 4 * H]; what it adds,
`hidden_state` [T, H], is the normed one, or in 1.3 what happened to lie in memory. It is not read.

Shapes: T tokens of a row, A aux layers, H hidden, L layers of the target.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorrt_llm
from tensorrt_llm.llmapi import KvCacheConfig, SaveHiddenStatesDecodingConfig

from shared.contracts.layers import to_output_ids
from shared.errors import RetryableError, UserError
from shared.vllm.versions import SUPPORTED_TENSORRT_LLM, is_within
from stages.dump.backends.base import EngineSettings

# The token that is sampled after a row, and the draft that the engine makes room for.
HEADROOM_TOKENS = 2
# How the source tells that a worker was killed, rather than left with an exception of its own.
_KILLED = "died during initialization"


@dataclasses.dataclass(kw_only=True)
class TrtllmSettings(EngineSettings):
    """What an engine for capture is started with; `max_num_batched_tokens` means nothing to it.

    Attributes:
        expert_parallel: how many of the GPUs that share the target the experts are dealt out to; it divides
            their number.
    """

    expert_parallel: int = 1

    def arguments(self, spool: Path) -> dict[str, Any]:
        """What the engine is started with: one row a step, whole, and nothing of it from a cache.

        Raises:
            UserError: id 0 is among the aux layers.
        """
        layers = layers_to_capture(self.aux_layers, self.num_layers)
        return {
            "model": str(self.target),
            "skip_tokenizer_init": True,
            "trust_remote_code": self.trust_remote_code,
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel,
            "moe_expert_parallel_size": self.expert_parallel if self.expert_parallel > 1 else None,
            "max_batch_size": 1,
            "max_seq_len": self.max_length_tokens + HEADROOM_TOKENS,
            "max_num_tokens": self.max_length_tokens + HEADROOM_TOKENS,
            "enable_chunked_prefill": False,
            "disable_overlap_scheduler": True,
            "cuda_graph_config": None,
            "kv_cache_config": KvCacheConfig(enable_block_reuse=False),
            "speculative_config": SaveHiddenStatesDecodingConfig(
                output_directory=str(spool),
                write_interval=1,
                eagle3_layers_to_capture=set(layers),
            ),
        }


def check_version(found: str) -> None:
    """Refuse a TensorRT-LLM whose source was not read.

    Raises:
        UserError: naming the version found and the versions supported.
    """
    if not is_within(found, SUPPORTED_TENSORRT_LLM):
        raise UserError(
            f"this stage captures with TensorRT-LLM {SUPPORTED_TENSORRT_LLM}, found TensorRT-LLM "
            f"{found}. Build the dump image on one of those (BASE_IMAGE), or set backend: hf."
        )


def layers_to_capture(aux_layers: Sequence[int], num_layers: int) -> list[int]:
    """Our aux layers and the final state, in TensorRT-LLM's numbers.

    Worked example, L = 8: (2, 4, 5) become [1, 3, 4, 7].

    Raises:
        UserError: id 0 is among them.
    """
    asked = to_output_ids([*aux_layers, num_layers])
    if asked[0] < 0:
        raise UserError(
            f"run.aux_layers: expected ids of 1 or more for backend: trtllm, found "
            f"{list(aux_layers)}. The embedding leaves no layer; set backend: hf or vllm."
        )
    return asked


@contextlib.contextmanager
def starting(target: str | Path) -> Iterator[None]:
    """A block that starts an engine.

    Raises:
        UserError: the engine refuses the target or the machine.
        RetryableError: it was killed.
    """
    # Rows may be as long as the target's own limit; no token is computed in the headroom.
    os.environ.setdefault("TLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        if _KILLED in str(error):
            raise RetryableError(
                f"TensorRT-LLM {tensorrt_llm.__version__} was killed while it started capturing "
                f"{target}: {error}. Run the same command again."
            ) from error
        raise UserError(
            f"TensorRT-LLM {tensorrt_llm.__version__} could not start capturing {target}: {error} "
            "The cause stands above this in the log. If the model is not supported, set backend: hf."
        ) from error


def engine_died(error: Exception) -> RetryableError:
    """What an engine that said `error` instead of an answer means."""
    return RetryableError(
        f"the TensorRT-LLM engine died with a row in flight ({error}); its log is above. Run the "
        "same command again to continue."
    )
