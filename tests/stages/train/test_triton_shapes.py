# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in the interpreter over 200 drawn shapes, in two dtypes each."""

from tests.quick.train.kernels.test_triton import run_in_interpreter

NUM_SHAPES = 200


def test_kernels_agree_with_the_reference_over_many_shapes() -> None:
    run_in_interpreter(0, NUM_SHAPES)
