# SPDX-License-Identifier: Apache-2.0
"""Tables that a terminal shows: foreign words in their cells, and a table as a log record.

rich would read `[/b]` in a cell as markup. A table that a stage prints is part of a record, so that
its lines are told from an engine's.
"""

import io
import logging

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.io.files import printable


def cell(value: object, style: str = "") -> Text:
    """A cell, a column's name or a title that shows `value` as it is, on one line."""
    return Text(printable(str(value)), style=style)


def log(logger: logging.Logger, table: Table, *, width: int = 100) -> None:
    """One record of several lines, plain text: the log file holds it as well."""
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as drawn:
        console.print(table)
    logger.info("%s", "\n" + drawn.get().rstrip())
