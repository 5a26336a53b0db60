# SPDX-License-Identifier: Apache-2.0
"""train's history.jsonl, as bench's page and ops' watch read it: loss and walks over the steps."""

import json
from pathlib import Path

from shared.io.files import read_text


def read_curves(path: Path) -> dict[str, list[list[float]]]:
    """`loss` and `walks` (walked acceptance lengths): [step, value] each; empty without a file."""
    curves: dict[str, list[list[float]]] = {"loss": [], "walks": []}
    lines = read_text(path).splitlines() if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
            for name, key in (("loss", "loss"), ("walks", "walked_acceptance_length")):
                if key in record:
                    curves[name].append([int(record["step"]), float(record[key])])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # a line that a crash cut
    return curves
