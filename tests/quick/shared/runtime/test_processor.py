# SPDX-License-Identifier: Apache-2.0
"""The faster precision follows from measured times."""

import time
from collections.abc import Iterator

import pytest
import torch

from shared.runtime import processor


@pytest.fixture(autouse=True)
def measured_anew() -> Iterator[None]:
    processor.faster_dtype.cache_clear()
    yield
    processor.faster_dtype.cache_clear()


@pytest.mark.parametrize(("slow", "fast"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_dtype_of_the_shorter_product_is_chosen(
    monkeypatch: pytest.MonkeyPatch, slow: str, fast: str
) -> None:
    linear = torch.nn.functional.linear

    def slowed(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        for _ in range(20 if rows.dtype == getattr(torch, slow) else 1):
            linear(rows.float(), weight.float())
        return rows

    monkeypatch.setattr(torch.nn.functional, "linear", slowed)
    assert processor.faster_dtype() == getattr(torch, fast)


def test_the_measurement_is_short_and_made_once() -> None:
    started_s = time.process_time()
    first = processor.faster_dtype()
    assert time.process_time() - started_s < 5
    started_s = time.process_time()
    assert processor.faster_dtype() is first
    assert time.process_time() - started_s < 0.01
