# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in the interpreter over 200 drawn shapes and two dtypes each."""

import pytest

from tests.quick.train.kernels.test_triton import needs_triton, run_in_interpreter

NUM_SHAPES = 200


@needs_triton
@pytest.mark.parametrize("kernel", ["attention", "loss"])
def test_kernels_agree_with_the_reference_over_many_shapes(kernel: str) -> None:
    run_in_interpreter(kernel, NUM_SHAPES)
