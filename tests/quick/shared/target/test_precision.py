# SPDX-License-Identifier: Apache-2.0
"""What `dtype: auto` is, by the machine and by the target."""

import json
from pathlib import Path

import pytest
import torch

from shared.target import precision
from shared.target.model import read_config
from tests import targets
from tests.models import tiny_llama


@pytest.mark.parametrize(
    ("faster", "has_gpu", "auto"),
    [
        (torch.float32, False, "float32"),
        (torch.bfloat16, False, "auto"),
        (torch.float32, True, "auto"),
    ],
)
def test_auto_is_the_precision_that_the_machine_is_faster_in(
    faster: torch.dtype,
    has_gpu: bool,
    auto: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "faster_dtype", lambda: faster)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    target = read_config(tiny_llama(tmp_path))
    assert precision.compute_dtype("auto", target) == auto
    assert precision.compute_dtype("bfloat16", target) == "bfloat16", "the recipe's own word stands"


def test_a_quantized_target_chooses_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "faster_dtype", lambda: torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tiny_llama(tmp_path) / "config.json"
    quantized = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}}
    path.write_text(json.dumps(quantized))
    assert precision.compute_dtype("auto", read_config(path.parent)) == "auto"


@pytest.mark.parametrize("keys_left_out", [(), ("layer_types", "architectures")])
def test_linear_attention_takes_bfloat16_alone(
    keys_left_out: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where config.json leaves the layers' types to its class, as Qwen3-Next's does."""
    monkeypatch.setattr(precision, "faster_dtype", lambda: torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    raw = targets.make_config("qwen3_next").to_dict()
    for key in keys_left_out:
        raw.pop(key)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert precision.compute_dtype("auto", read_config(tmp_path)) == "bfloat16"
