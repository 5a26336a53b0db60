# SPDX-License-Identifier: Apache-2.0
"""What a target will take, and the recipe to begin with, from its config.json and tensor headers.

In: a model's folder, a config.json, or a hub id (its config.json and headers are fetched). Out: facts,
sizes, GPUs and parallelism for a table of GPU types, the draft head's shape, disk, acceptance lengths
that were reached; and a recipe that `run --dry_run` takes, and a Kubernetes overlay. Costs some seconds,
and no weight is read.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml
from rich.console import Console

from shared import expected
from shared.config import RunConfig
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
        UserError: no such model, no plan for these flags, or another recipe or overlay is there.
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
    config = _located(config)
    text = recipe(plan, config)
    _require_run(text)
    texts = {} if config.overlay is None else overlay.texts(plan, config, config.overlay)
    if config.out is not None:
        texts[config.out] = text
    _write(texts, overwrite=config.overwrite)


def _located(config: PlanConfig) -> PlanConfig:
    """The flags with the name and the target that a model here gives its recipe.

    Raises:
        UserError: the model is a file alone, which no stage takes as its target.
    """
    found = find_input(config.model, config.workspace)
    if found is None:  # a hub id says both
        return config
    given = Path(config.model)
    folder, given = (found, given) if found.is_dir() else (found.parent, given.parent)
    folder = folder.resolve() if folder.name == ".." else folder
    name = folder.name
    if not found.is_dir() and found.name != "config.json":
        name = found.stem
        if config.target is None:
            raise UserError(
                f"{found}: expected a model's folder as the recipe's target, found a file alone.",
                code="plan-target-a-file",
                remedy="Give --target: the folder or the hub id of its model.",
                facts={"path": str(found)},
            )
    # Names like "." mean another folder in another place.
    target = config.target or str(folder if given.name in ("", "..") else given)
    return config.model_copy(update={"name": config.name or name.lower(), "target": target})


def _require_run(recipe_text: str) -> None:
    """Refuse a recipe that no stage would take.

    Raises:
        UserError: the flags, or the model's name and lengths, make no run of it.
    """
    try:
        RunConfig.model_validate(yaml.safe_load(recipe_text)["run"])
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        setting = first["loc"][0]
        raise UserError(
            f"run.{setting}: {expected.wrong(first)}.",
            code="plan-recipe-invalid",
            remedy="Give another --name or --length.",
            facts={"setting": f"run.{setting}", "found": expected.found(first)},
        ) from error


def _write(texts: Mapping[Path, str], *, overwrite: bool) -> None:
    """Write the files, all or none of them.

    Raises:
        UserError: one is there with other content, perhaps edited since.
    """
    for path, text in texts.items():
        digest = hashlib.sha256(text.encode()).hexdigest()
        if path.exists() and not overwrite and files.sha256(path) != digest:
            raise UserError(
                f"{path}: expected no file or this plan's, found another.",
                code="plan-file-taken",
                remedy="Choose another place, or replace it: --overwrite.",
                facts={"path": str(path)},
            )
    for path, text in texts.items():
        files.write_text(path, text)


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
