# SPDX-License-Identifier: Apache-2.0
"""The table that synth prints when it is done."""

import logging

import numpy as np
from rich.table import Table

from shared.runtime import tables
from shared.runtime.status import Accounting
from shared.runtime.tables import cell
from stages.synth.config import SynthConfig
from stages.synth.parts import Totals

logger = logging.getLogger(__name__)

_PERCENTILES = (10, 50, 90, 99, 100)


def print_summary(config: SynthConfig, accounting: Accounting, totals: Totals) -> None:
    """Print the accounting, lengths against their limits, finish reasons, the trained share."""
    table = Table(title=cell(f"{config.run.name}: synth"), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    counts = accounting.as_dict()
    table.add_row("prompts in", f"{counts['in']:,}")
    table.add_row("answered", f"{counts['ok']:,}")
    for kind in ("skipped", "failed"):
        for reason, number in counts[kind].items():
            table.add_row(cell(f"{kind}: {reason}"), f"{number:,}")
    table.add_row("rows written", f"{totals.rows:,}", end_section=True)
    limits = {
        "answer": (totals.answer_lengths, "max_tokens", config.max_tokens),
        "row": (totals.row_lengths, "run.max_length_tokens", config.run.max_length_tokens),
    }
    for label, (lengths, name, limit) in limits.items():
        if not lengths:
            continue
        for percent, length in zip(_PERCENTILES, np.percentile(lengths, _PERCENTILES), strict=True):
            table.add_row(f"{label} tokens, {percent} % of rows up to", f"{length:,.0f}")
        table.add_row(f"{label} tokens allowed ({name})", f"{limit:,}", end_section=True)
    table.add_row("answer tokens in all", f"{totals.answer_tokens:,}", end_section=True)
    for reason, number in totals.finish_reasons.items():
        table.add_row(cell(f"finish_reason {reason or 'unknown'}"), f"{number:,}")
    share = totals.trained_tokens / max(1, totals.tokens)
    table.add_row("tokens that are trained on", f"{share:.1%}")
    tables.log(logger, table)
