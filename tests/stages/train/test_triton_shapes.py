# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels in the interpreter over 200 drawn shapes, in two dtypes each.

`make test` takes the first of them; continuous integration runs this file whole.
"""

import pytest

from tests.quick.train.kernels.test_triton import run_in_interpreter

FIRST_SHAPES, NUM_SHAPES = 40, 200


def test_kernels_agree_with_the_reference_over_many_shapes() -> None:
    run_in_interpreter(0, FIRST_SHAPES)


@pytest.mark.soak
def test_kernels_agree_with_the_reference_over_the_other_shapes() -> None:
    run_in_interpreter(FIRST_SHAPES, NUM_SHAPES)
