# SPDX-License-Identifier: Apache-2.0
"""What dump's tests share: its settings, and the bytes that it made."""

from pathlib import Path
from typing import Any

from shared.settings import build
from stages.dump.config import DumpConfig
from stages.dump.run import run as dump

NUM_ROWS = 40


def config(workspace: Path, **flags: Any) -> DumpConfig:
    texts = {name: str(value) for name, value in flags.items()}
    recipe = str(workspace / "recipe.yaml")
    return build(DumpConfig, {"recipe": recipe, "workspace": str(workspace), **texts})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard_*.pt"))}


def samples_dump(workspace: Path) -> Path:
    dump(config(workspace, layout="samples"))
    return workspace / "run" / "dump"
