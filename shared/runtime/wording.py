# SPDX-License-Identifier: Apache-2.0
"""Numbers in sentences."""

from collections import Counter


def counted(number: int, noun: str) -> str:
    """`1 row`, `1,000 rows`: for nouns whose plural is theirs and an s."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def listed(reasons: Counter[str], most: int | None = None) -> str:
    """`7 cut, 2 no_chat`: the commonest first, those that there are."""
    return ", ".join(f"{count:,} {reason}" for reason, count in (+reasons).most_common(most))
