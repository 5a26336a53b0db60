# SPDX-License-Identifier: Apache-2.0
"""A vLLM server of the stage's own, with the recipe's options, as an endpoint to ask."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.target.model import read_config
from shared.target.precision import compute_dtype
from shared.target.templates import template_file
from shared.vllm.http import Address
from shared.vllm.server import MODEL_NAME, start_server
from stages.synth.client import Endpoint
from stages.synth.config import SynthConfig


def _options(config: SynthConfig, target: Path) -> dict[str, Any]:
    return {
        "model": target,
        "dtype": compute_dtype(config.dtype, read_config(target)),
        "max-model-len": config.run.max_length_tokens,
        "max-num-seqs": config.concurrency,
        "tensor-parallel-size": config.tensor_parallel_size,
        "pipeline-parallel-size": config.pipeline_parallel_size,
        "reasoning-parser": config.reasoning_parser,
        "tool-call-parser": config.tool_call_parser,
        "enable-auto-tool-choice": config.tool_call_parser is not None or None,
        "seed": config.run.seed,
        "chat-template": template_file(
            target, config.run, config.workspace, config.paths.root / "chat_template.jinja"
        ),
        # The recipe says how to sample; the target's generation_config.json must not.
        "generation-config": "vllm",
        "trust-remote-code": config.run.trust_remote_code or None,
        **config.server_args,
    }


@contextlib.contextmanager
def serve(config: SynthConfig, target: Path) -> Iterator[Endpoint]:
    """A ready server of our own for the length of the block."""
    with start_server(_options(config, target), config.server_env) as server:
        server.wait_until_ready(stage="synth", timeout_s=config.startup_timeout_s)
        yield Endpoint(
            address=Address(server.base_url, server.api_key),
            model=MODEL_NAME,
            exit_code=server.exit_code,
            is_healthy=server.is_healthy,
        )
