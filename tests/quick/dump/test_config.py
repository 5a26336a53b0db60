# SPDX-License-Identifier: Apache-2.0
"""The section `dump`: engine options, and what changes the fingerprint."""

import pytest

from shared.errors import UserError
from shared.settings import build
from stages.dump.config import DumpConfig


def config(**flags: str) -> DumpConfig:
    return build(DumpConfig, {"target": "t", **flags})


def test_options_of_speed_and_memory_keep_the_identity() -> None:
    plain = config().identity()
    assert config(engine_args="{gpu_memory_utilization: 0.5, max_num_seqs: 8}").identity() == plain
    assert config(engine_args="{--max-num-seqs: 8}").identity() == plain
    changed = config(engine_args="{quantization: fp8, max_num_seqs: 8}").identity()
    assert changed == plain | {"dump.engine_args": {"quantization": "fp8"}}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"engine_args": "{max_model_len: 9}"}, "which is set by run.max_length_tokens"),
        ({"engine_args": "{dtype: float16}"}, "which is set by dump.dtype"),
        ({"engine_args": "{speculative_config: {}}"}, "cannot be changed"),
        ({"engine_args": "{spec_tokens: 2}"}, r"found spec_tokens \(speculative-config\)"),
        ({"engine_args": "{max-model-len: 9}"}, "which is set by run.max_length_tokens"),
        ({"engine_args": "{enable_prefix_caching: true}"}, "cannot be changed"),
        ({"engine_args": "{max_num_seqs: 2}", "backend": "hf"}, "needs backend: vllm or auto"),
        ({"engine_args": "{max_num_seqs: 2}", "states": "folder"}, "needs backend: vllm or auto"),
        ({"expert_parallel_size": "2"}, "enable_expert_parallel: true"),
    ],
)
def test_settings_that_would_do_nothing_or_break_capturing_are_refused(
    flags: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config(**flags)


@pytest.mark.parametrize(("text", "engines"), [(None, 1), ("4", 4), ("many", 1)])
def test_engines_on_this_node(
    monkeypatch: pytest.MonkeyPatch, text: str | None, engines: int
) -> None:
    if text is not None:
        monkeypatch.setenv("EYRIE_ENGINES_ON_NODE", text)
    assert config().engines_on_node == engines
