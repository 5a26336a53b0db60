# SPDX-License-Identifier: Apache-2.0
"""What a person sees when synth is done."""

import numpy as np
from rich.console import Console
from rich.table import Table

from shared.runtime.status import Accounting
from shared.runtime.tables import cell
from stages.synth.parts import Totals

_PERCENTILES = (10, 50, 90, 99, 100)


def show(name: str, accounting: Accounting, totals: Totals) -> None:
    """Print the accounting, answer lengths, finish reasons and the share of trained tokens."""
    table = Table(title=cell(f"{name}: synth"), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    counts = accounting.as_dict()
    table.add_row("prompts in", f"{counts['in']:,}")
    table.add_row("answered", f"{counts['ok']:,}")
    for kind in ("skipped", "failed"):
        for reason, number in counts[kind].items():
            table.add_row(cell(f"{kind}: {reason}"), f"{number:,}")
    table.add_row("rows written", f"{totals.rows:,}", end_section=True)
    if totals.answer_lengths:
        lengths = np.percentile(totals.answer_lengths, _PERCENTILES)
        for percent, length in zip(_PERCENTILES, lengths, strict=True):
            table.add_row(f"answer tokens, {percent} % of rows up to", f"{length:,.0f}")
    table.add_row("answer tokens in all", f"{totals.answer_tokens:,}", end_section=True)
    for reason, number in totals.finish_reasons.items():
        table.add_row(cell(f"finished by {reason or 'nothing told'}"), f"{number:,}")
    share = totals.trained_tokens / max(1, totals.tokens)
    table.add_row("tokens that are trained on", f"{share:.1%}")
    Console(stderr=True, width=100).print(table)
