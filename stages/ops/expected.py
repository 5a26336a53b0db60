# SPDX-License-Identifier: Apache-2.0
"""The acceptance length to expect, from what was reached with as much data: by others, and measured here.

In: rows, epochs and the target's hidden size. Out: one line that names the figures next below and next above
in rows, each with its draft length K, prompts and source; nothing where no figure compares. K bounds an
acceptance length (K + 1), and prompts differ, so the figures are quoted and never interpolated. And the
acceptance length that bench may require of as many rows.
"""

import math
from typing import Any

from shared.runtime.wording import counted
from stages.ops.tables import read_data

_WIDTHS = 2.0  # a target compares if its hidden size is within this factor of the published one's
_FEWEST = 0.2  # so much of the smallest published number of rows still says something
_GATE_SHARE = 0.9  # of what was reached, since prompts differ
_MAX_GATE = 2.1  # bench's default
_NO_GATE = 0.0  # every head passes it


def published() -> list[dict[str, Any]]:
    """Every figure: target, acceptance_length, source; most with samples, epochs and k."""
    rows: list[dict[str, Any]] = read_data("published.yaml")
    return rows


def expectation(rows: int | None, epochs: int, hidden_size: int | None) -> str:
    """One line for the operator, or "" where nothing comparable is known.

    Of two figures for as many rows the better one counts: it was trained on the target's own answers, as
    synth makes them, or measured on prompts like the training's.
    """
    known = _comparable(rows, hidden_size)
    if not rows or not known:
        return ""
    below = max((count for count in known if count <= rows), default=None)
    above = min((count for count in known if count > rows), default=None)
    quoted = [_quoted(known[count][-1]) for count in (below, above) if count is not None]
    return (
        f"{counted(rows, 'row')} x {counted(epochs, 'epoch')}; reached so far: {', '.join(quoted)}"
    )


def gate(rows: int, hidden_size: int) -> float:
    """The acceptance length for bench to require; 0, which every head reaches, where nothing compares.

    Nine tenths of the lowest figure for as many rows, or for the next fewer, in steps of 0.1; at most
    bench's default. So more rows never have a lower gate than fewer.

    Worked example: 50,000 rows, where 1.94 was reached, give 1.7.
    """
    known = _comparable(rows, hidden_size)
    if not known:
        return _NO_GATE
    count = max((count for count in known if count <= rows), default=min(known))
    lowest: float = known[count][0]["acceptance_length"]
    return min(math.floor(10 * _GATE_SHARE * lowest) / 10, _MAX_GATE)


def _comparable(rows: int | None, hidden_size: int | None) -> dict[int, list[dict[str, Any]]]:
    """Number of rows -> the figures for it, the lowest first, of targets that compare in size."""
    known: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(published(), key=lambda row: float(row["acceptance_length"])):
        width = row.get("hidden_size")
        if "samples" not in row or not width or not hidden_size:
            continue
        if max(width, hidden_size) <= _WIDTHS * min(width, hidden_size):
            known.setdefault(row["samples"], []).append(row)
    is_enough = known and rows and rows >= _FEWEST * min(known)
    return known if is_enough else {}


def _quoted(row: dict[str, Any]) -> str:
    """`AL 1.94 from 50,000 rows x 5 epochs (Qwen2.5-7B on GSM8K, SpecForge issue 128)`."""
    epochs = f" x {counted(row['epochs'], 'epoch')}" if "epochs" in row else ""
    depth = f" at K = {row['k']}" if "k" in row else ""
    prompts = f" on {row['prompts']}" if "prompts" in row else ""
    return (
        f"AL {row['acceptance_length']:.2f} from {row['samples']:,} rows{epochs}{depth} "
        f"({row['target']}{prompts}, {row['source']})"
    )
