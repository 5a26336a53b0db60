# SPDX-License-Identifier: Apache-2.0
"""`report.json`, which bench writes and others read: its version, and how it is opened."""

from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.files import read_json

SCHEMA_VERSION = 2


def read_report(path: Path) -> dict[str, Any]:
    """A finished report of this schema.

    Raises:
        UserError: none, or one of another version.
    """
    report = read_json(path)
    version = report.get("schema_version") if isinstance(report, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: expected a bench report of schema version {SCHEMA_VERSION}, found {version}. "
            "Measure again with this version of eyrie."
        )
    return dict(report)
