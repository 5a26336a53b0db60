# SPDX-License-Identifier: Apache-2.0
"""Heads of tiny targets of many families, from kept answers to vLLM's own loader of the head.

No engine starts: vLLM builds target class and draft model as for serving, without memory.
"""

from pathlib import Path
from typing import Any

import pytest

from shared.contracts.head_folder import read_head
from stages.bench.head_check import _ask
from tests import chains, targets

pytestmark = pytest.mark.engine

USUAL = ("granite", "gemma2")


def asked(target: Path, head: Path, model_impl: str, work: Path) -> dict[str, Any]:
    """What vLLM says of the head."""
    question = {
        "target": str(target),
        "trust_remote_code": False,
        "dtype": "float32",
        "max_model_len": 128,
        "engine_args": {"model_impl": model_impl},
        "speculative": {"method": "eagle3", "model": str(head), "num_speculative_tokens": 2},
        "shapes": read_head(head).shapes,
    }
    return _ask(question, work)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in USUAL else pytest.mark.soak)
        for name in targets.SERVED
    ],
)
def test_vllm_takes_the_head_as_the_page_says(name: str, tmp_path: Path) -> None:
    head, target = chains.export(name, tmp_path), tmp_path / chains.TARGET
    how = targets.SERVED[name]
    if how != "auto":
        answer = asked(target, head, "auto", tmp_path)
        assert "without_hooks" in answer or "refusal" in answer
    answer = asked(target, head, how or "transformers", tmp_path)
    if not how:
        assert "refusal" in answer
        return
    assert not answer["refused"]
    assert not answer["unwritten"]
    assert answer["dropped"] == ["t2d"]  # which vLLM does not need
    assert len(answer["aux_layers"]) == answer["num_aux_states"] == 3
