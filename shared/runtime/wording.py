# SPDX-License-Identifier: Apache-2.0
"""Numbers in sentences."""


def counted(number: int, noun: str) -> str:
    """`1 row`, `1,000 rows`: for nouns whose plural is theirs and an s."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
