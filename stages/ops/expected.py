# SPDX-License-Identifier: Apache-2.0
"""The acceptance length to expect, from what others have published for as much data.

In: rows, epochs and the target's hidden size. Out: one line that names the published figures next below
and next above in rows, each with its draft length K and source; nothing where no figure compares. K bounds an
acceptance length (K + 1), and prompts differ, so the figures are quoted and never interpolated.
"""

from pathlib import Path
from typing import Any

import yaml

_PUBLISHED = Path(__file__).parent / "plan" / "data" / "published.yaml"
_WIDTHS = 2.0  # a target compares if its hidden size is within this factor of the published one's
_FEWEST = 0.2  # so much of the smallest published number of rows still says something


def published() -> list[dict[str, Any]]:
    """Every published figure: target, acceptance_length, source; most with samples, epochs and k."""
    rows: list[dict[str, Any]] = yaml.safe_load(_PUBLISHED.read_text(encoding="utf-8"))
    return rows


def expectation(rows: int | None, epochs: int, hidden_size: int | None) -> str:
    """One line for the operator, or "" where nothing comparable is known.

    Of two figures for as many rows the better one counts: it was trained on the target's own answers, as
    synth makes them.
    """
    if not rows or not hidden_size:
        return ""
    known: dict[int, dict[str, Any]] = {}
    for row in published():
        width = row.get("hidden_size")
        if "samples" not in row or not width:
            continue
        if max(width, hidden_size) > _WIDTHS * min(width, hidden_size):
            continue
        known.setdefault(row["samples"], row)
        if row["acceptance_length"] > known[row["samples"]]["acceptance_length"]:
            known[row["samples"]] = row
    if not known or rows < _FEWEST * min(known):
        return ""
    below = max((count for count in known if count <= rows), default=None)
    above = min((count for count in known if count > rows), default=None)
    quoted = [_quoted(known[count]) for count in (below, above) if count is not None]
    return f"{rows:,} rows x {epochs} epochs; others reached {', '.join(quoted)}"


def _quoted(row: dict[str, Any]) -> str:
    """`AL 1.89 from 5,000 rows x 5 epochs at K = 3 (Qwen3-8B, speculators pull request 1132)`."""
    epochs = f" x {row['epochs']} epochs" if "epochs" in row else ""
    depth = f" at K = {row['k']}" if "k" in row else ""
    return (
        f"AL {row['acceptance_length']:.2f} from {row['samples']:,} rows{epochs}{depth} "
        f"({row['target']}, {row['source']})"
    )
