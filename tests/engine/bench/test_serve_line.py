# SPDX-License-Identifier: Apache-2.0
"""The command that a report names, read by vLLM's own parser; no engine starts."""

import json
import shlex

import pytest

from tests.quick.bench.report.reports import config, made

pytestmark = pytest.mark.engine


def test_vllm_reads_the_command_as_it_was_measured() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    chosen = config(
        target="org/target",
        target_revision="v1",
        head="org/head",
        reasoning="disable",
        tensor_parallel_size="2",
        engine_args="{enforce_eager: true, enable_prefix_caching: false, max_num_seqs: 8, "
        "cudagraph_capture_sizes: [1, 8], limit_mm_per_prompt: {image: 0}}",
    )
    told = {"trust-remote-code": True, "dtype": "float32", "chat-template": "/run/a.jinja"}
    program, command, *words = shlex.split(made(chosen, serving=told)["best"][0]["serve"])
    assert (program, command) == ("vllm", "serve")
    read = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    assert (read.model_tag, read.revision, read.dtype) == ("org/target", "v1", "float32")
    assert (read.enforce_eager, read.enable_prefix_caching) == (True, False)
    assert (read.max_num_seqs, read.tensor_parallel_size) == (8, 2)
    assert read.cudagraph_capture_sizes == [1, 8]
    assert read.trust_remote_code is True
    assert read.chat_template == "/run/a.jinja"
    assert read.default_chat_template_kwargs["enable_thinking"] is False
    speculative = read.speculative_config
    speculative = json.loads(speculative) if isinstance(speculative, str) else speculative
    assert (speculative["method"], speculative["model"]) == ("eagle3", "org/head")
