# SPDX-License-Identifier: Apache-2.0
"""Facts that are looked up: GPU types, published acceptance lengths, tokenizers."""

from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).with_name("data")


def read_data(name: str) -> Any:
    """One of the tables in `data/`."""
    return yaml.safe_load((DATA / name).read_text(encoding="utf-8"))
