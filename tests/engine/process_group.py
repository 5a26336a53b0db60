# SPDX-License-Identifier: Apache-2.0
"""The process groups that vLLM's own layers ask for, in a test's process."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def single_process_group(config: Any) -> Iterator[None]:
    """One rank's groups under `config`; the end of the test's file takes them down."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        yield
