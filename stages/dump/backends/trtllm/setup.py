# SPDX-License-Identifier: Apache-2.0
"""What a TensorRT-LLM engine is started with for a capture, and what its failures mean.

Read in the repository NVIDIA/TensorRT-LLM, not in a release's tag: `save_hidden_state.py` at 3e906a0e,
`version.py` at b35ac1b6 (1.2.0rc2), `modeling_qwen3.py` at 010bb95f, `model_engine.py` at 1a0dc5f7, and
of 1.3's line `eagle3.py`, `save_hidden_state.py` and `llm_args.py`. By that source:

- A layer's output is taken as hidden + residual, before the next norm, for the last layer too; id -1
  is after the final norm. Ours are boundaries: id i is the state entering layer i, id L the final
  state. So our id i is the output of its layer i - 1, the final state that of L - 1, and our id 0, the
  embedding, which would be -1 too, cannot be had.
- All rows of a step are stored from the buffer's first row on. So a step may hold one row, whole and
  computed anew: batch size 1, no chunks, no reuse of blocks.
- A model without hooks is not refused: its buffer keeps what it held. Two rows are compared at start.
- Logits are cut to a row's last token on this path, so no row's log-probabilities can be had.
- A request's time limit is ignored and a killed worker reports nothing: no file for 300 s is exit 75.

Worked example, L = 8, aux layers (2, 4, 5): the outputs of 1, 3, 4 and 7 are requested. A file holds
them side by side in ascending order, `aux_hidden_states` [T, 4 * H]; what it adds, `hidden_state`
[T, H], is the normed one, or in 1.3 whatever was in memory. It is not read.

Shapes: T tokens of a row, A aux layers, H hidden, L layers of the target.
"""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorrt_llm
from tensorrt_llm.llmapi import KvCacheConfig, SaveHiddenStatesDecodingConfig

from shared.contracts.layers import to_output_ids
from shared.errors import RetryableError, UserError
from shared.vllm.engine_start import start_error
from shared.vllm.versions import SUPPORTED_TENSORRT_LLM, is_within
from stages.dump.backends.base import EngineSettings

# The token that is sampled after a row, and the draft that the engine makes room for.
HEADROOM_TOKENS = 2
# In the message where a worker was killed, rather than left with an exception of its own.
_KILLED = "died during initialization"


@dataclasses.dataclass(kw_only=True)
class TrtllmSettings(EngineSettings):
    """What an engine for capture is started with; `max_num_batched_tokens` means nothing to it.

    Attributes:
        expert_parallel: how many of the GPUs that share the target share its experts; it divides
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


def check_version(version: str) -> None:
    """Refuse a TensorRT-LLM whose source was not read.

    Raises:
        UserError: naming the version found and the supported ones.
    """
    if not is_within(version, SUPPORTED_TENSORRT_LLM):
        raise UserError(
            f"this stage captures with TensorRT-LLM {SUPPORTED_TENSORRT_LLM}, found TensorRT-LLM "
            f"{version}.",
            code="engine-version",
            remedy="Build the dump image on one of those (BASE_IMAGE), or set backend: hf.",
            facts={"supported": SUPPORTED_TENSORRT_LLM, "found": version},
        )


def layers_to_capture(aux_layers: Sequence[int], num_layers: int) -> list[int]:
    """Our aux layers and the final state, in TensorRT-LLM's numbers.

    Worked example, L = 8: (2, 4, 5) become [1, 3, 4, 7].

    Raises:
        UserError: id 0 is among them.
    """
    outputs = to_output_ids([*aux_layers, num_layers])
    if outputs[0] < 0:
        raise UserError(
            f"run.aux_layers: expected ids of 1 or more for backend: trtllm, found "
            f"{list(aux_layers)}: the embedding is no layer's output.",
            code="embedding-not-captured",
            remedy="Set backend: hf or vllm.",
            facts={"aux_layers": list(aux_layers)},
        )
    return outputs


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
        raise start_error(
            f"TensorRT-LLM {tensorrt_llm.__version__} could not start capturing {target}: {error}",
            [-signal.SIGKILL] if _KILLED in str(error) else [],
            remedy="The cause is above this line in the log. If TensorRT-LLM does not support the "
            "model, set backend: hf.",
        ) from error


def engine_died(error: Exception) -> RetryableError:
    """The error for an engine that raised `error` instead of answering."""
    return RetryableError(
        f"the TensorRT-LLM engine died with a row in flight ({error}).",
        code="engine-died",
        remedy="Its log is above; run the same command again to continue.",
    )
