# SPDX-License-Identifier: Apache-2.0
"""train's history.jsonl, as bench's page and ops' watch read it: loss and walks over the steps."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.io.files import read_text

_LARGEST = 1e100  # of values that a curve is computed with
_DAMAGE = (ValueError, KeyError, TypeError, OverflowError)  # of a value that is no number


def read_shares(path: Path, step: int) -> list[float] | None:
    """Shares of the walk's drafts that were accepted up to each position, at a step; None if not known."""
    for record in _records(path):
        if record.get("step") == step and "per_position" in record:
            with contextlib.suppress(*_DAMAGE):
                return [float(share) for share in record["per_position"]]
    return None


def read_curves(path: Path) -> dict[str, list[list[float]]]:
    """`loss` and `walks` (walked acceptance lengths): [step, value] each; empty without a file.

    A loss that is NaN or infinite is left out: there is nothing to draw.
    """
    curves: dict[str, list[list[float]]] = {"loss": [], "walks": []}
    for record in _records(path):
        with contextlib.suppress(*_DAMAGE):
            for name, key in (("loss", "loss"), ("walks", "walked_acceptance_length")):
                if key in record and abs(value := float(record[key])) < _LARGEST:
                    curves[name].append([int(float(record["step"])), value])
    return curves


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole: a crash may have cut one."""
    for line in read_text(path).splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record
