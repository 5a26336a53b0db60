# SPDX-License-Identifier: Apache-2.0
"""train's history.jsonl, as bench's page and ops' watch read it: loss and walks over the steps."""

import json
from pathlib import Path

from shared.io.files import read_text

_LARGEST = 1e100  # of values that a curve is computed with


def read_shares(path: Path, step: int) -> list[float] | None:
    """Shares of the walk's drafts that were accepted up to each position, at a step; None if not known."""
    for line in read_text(path).splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            if record.get("step") == step and "per_position" in record:
                return [float(share) for share in record["per_position"]]
        except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
            continue  # a line that a crash cut
    return None


def read_curves(path: Path) -> dict[str, list[list[float]]]:
    """`loss` and `walks` (walked acceptance lengths): [step, value] each; empty without a file.

    A loss that is NaN or infinite is left out: there is nothing to draw.
    """
    curves: dict[str, list[list[float]]] = {"loss": [], "walks": []}
    lines = read_text(path).splitlines() if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
            for name, key in (("loss", "loss"), ("walks", "walked_acceptance_length")):
                if key in record and abs(value := float(record[key])) < _LARGEST:
                    curves[name].append([int(float(record["step"])), value])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # a line that a crash cut
    return curves
