# SPDX-License-Identifier: Apache-2.0
"""Foreign words in the tables that a terminal shows: rich would read `[/b]` in them as markup."""

from rich.text import Text

from shared.runtime.log import printable


def cell(value: object, style: str = "") -> Text:
    """A cell, a column's name or a title that shows `value` as it is, on one line."""
    return Text(printable(str(value)), style=style)
