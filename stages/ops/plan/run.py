# SPDX-License-Identifier: Apache-2.0
"""What a target will take, and the recipe to begin with, from its config.json and tensor headers.

In: a model's folder, a config.json, or a hub id (its config.json and headers are fetched). Out: facts,
sizes, GPUs and parallelism for a table of GPU types, the draft head's shape, disk, what others have
reached; and a recipe that `run --dry_run` takes, and a Kubernetes overlay. Costs some seconds, and no
weight is read.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from shared.errors import UserError
from shared.io import files, safetensors_files
from shared.io.safetensors_files import TensorInfo
from shared.paths import find_input
from stages.ops.config import PlanConfig
from stages.ops.plan import overlay
from stages.ops.plan.architecture import understand
from stages.ops.plan.model import make_plan
from stages.ops.plan.output import as_json, recipe, show


def run(config: PlanConfig) -> None:
    """Make the plan, show it, write the recipe and the overlay.

    Raises:
        UserError: no such model, or no plan for these flags.
        RetryableError: the hub cannot be reached.
    """
    path, raw, tensors = read_model(config.model, config.workspace)
    plan = make_plan(config.model, understand(raw, str(path)), tensors)
    if config.as_json:
        sys.stdout.write(json.dumps(as_json(plan, config), indent=2) + "\n")
    else:
        show(plan, config, Console(width=None if sys.stdout.isatty() else 160))
    if config.out is None and config.overlay is None:
        return
    if plan.placements and config.gpu not in plan.placements:
        known = ", ".join(plan.placements)
        raise UserError(
            f"--gpu: expected one of {known}, found {config.gpu!r}.",
            code="plan-gpu-unknown",
            remedy="Give the type that comes nearest in memory.",
        )
    if config.overlay is not None:
        overlay.write(plan, config, config.overlay)
    if config.out is not None:
        files.write_text(config.out, recipe(plan, config))


def read_model(model: str, workspace: Path) -> tuple[Path, Any, dict[str, TensorInfo] | None]:
    """(where it lies, the parsed config.json, its tensors) of a folder, a file or a hub id.

    Raises:
        UserError: there is none, or its safetensors files are damaged.
        RetryableError: the hub cannot be reached.
    """
    found = find_input(model, workspace)
    if found is not None:
        path = found / "config.json" if found.is_dir() else found
        tensors = None
        if path.name == "config.json" and any(path.parent.glob("*.safetensors")):
            tensors = safetensors_files.list_tensors(path.parent)
        return path, files.read_json(path), tensors
    from shared.target import hub

    hub.require_id(model, workspace, label="model")
    path = hub.fetch_config(model, None)
    return path, files.read_json(path), hub.fetch_tensors(model, None)
