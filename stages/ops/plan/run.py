# SPDX-License-Identifier: Apache-2.0
"""What a target will take, and the recipe to begin with, from its config.json alone.

In: a model's folder, a config.json, or a hub id (that one file is fetched). Out: facts, sizes, GPUs
and parallelism for a table of GPU types, the draft head's shape, disk, what others have reached; and
a recipe that `run --dry_run` takes, and a Kubernetes overlay. Costs milliseconds, and no weight is read.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from shared.errors import RetryableError, UserError
from shared.io import files
from shared.paths import find_input
from stages.ops.config import PlanConfig
from stages.ops.plan import overlay
from stages.ops.plan.architecture import understand
from stages.ops.plan.model import make_plan
from stages.ops.plan.output import as_json, recipe, show


def run(config: PlanConfig) -> None:
    """Make the plan, show it, write the recipe and the overlay."""
    path, raw = read_model(config.model, config.workspace)
    plan = make_plan(config.model, understand(raw, str(path)))
    if config.as_json:
        sys.stdout.write(json.dumps(as_json(plan, config), indent=2) + "\n")
    else:
        show(plan, config, Console(width=None if sys.stdout.isatty() else 160))
    if config.out is None and config.overlay is None:
        return
    if config.gpu not in plan.placements:
        known = ", ".join(plan.placements)
        raise UserError(f"--gpu: expected one of {known}, found {config.gpu!r}.")
    if config.overlay is not None:
        overlay.write(plan, config, config.overlay)
    if config.out is not None:
        files.write_text(config.out, recipe(plan, config))


def read_model(model: str, workspace: Path) -> tuple[Path, Any]:
    """(where it lies, the parsed config.json) of a folder, a file or a hub id.

    Raises:
        UserError: there is none.
        RetryableError: the hub cannot be reached.
    """
    found = find_input(model, workspace)
    if found is not None:
        path = found / "config.json" if found.is_dir() else found
        return path, files.read_json(path)
    if model.count("/") != 1 or model.startswith((".", "/")):
        raise UserError(
            f"expected a model's folder, a config.json or a hub id (organisation/name), found "
            f"{model!r}: nothing of that name in {workspace} or here."
        )
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        path = Path(huggingface_hub.hf_hub_download(model, "config.json"))
    except (hub.RepositoryNotFoundError, hub.EntryNotFoundError, hub.HFValidationError) as error:
        if not isinstance(error, hub.LocalEntryNotFoundError):
            raise UserError(f"{model} is no folder, and the hub says: {error}") from error
        raise RetryableError(
            f"{model} is no folder here, and the hub could not be reached. Give its config.json."
        ) from error
    except OSError as error:
        raise RetryableError(f"{model}: the hub could not be reached ({error}).") from error
    return path, files.read_json(path)
