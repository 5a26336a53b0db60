# SPDX-License-Identifier: Apache-2.0
"""Cutting a range into pieces of equal size."""

import itertools
from collections.abc import Iterator


def even_slices(start: int, stop: int, longest: int) -> Iterator[slice]:
    """`start:stop` in as few pieces of at most `longest` as possible, of nearly equal size.

    Worked example: 2:9 in pieces of at most 3 is 2:4, 4:6, 6:9.
    """
    pieces = -(-(stop - start) // longest)
    cuts = [start + i * (stop - start) // pieces for i in range(pieces + 1)] if pieces else []
    return itertools.starmap(slice, itertools.pairwise(cuts))
