# SPDX-License-Identifier: Apache-2.0
"""Numbers in sentences."""

import pytest

from shared.runtime.wording import counted


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (12_345, "12,345 rows")]
)
def test_one_is_no_plural(number: int, said: str) -> None:
    assert counted(number, "row") == said
