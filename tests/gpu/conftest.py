# SPDX-License-Identifier: Apache-2.0
"""The device under test: CUDA, or what EYRIE_GPU_CHECK_DEVICE names (the tests' own test says cpu)."""

import os

import pytest
import torch

DEVICE_VARIABLE = "EYRIE_GPU_CHECK_DEVICE"


@pytest.fixture(scope="session")
def device() -> torch.device:
    found = torch.device(os.environ.get(DEVICE_VARIABLE, "cuda"))
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return found
