# SPDX-License-Identifier: Apache-2.0
"""The run's own copy of its recipe: `<run>/recipe.yaml`, kept up by every stage that starts its work.

In: a stage's settings, from the recipe's file and from flags. Out: one recipe by which the run can be
made again; what other stages recorded stays.
"""

import logging
from typing import Any

import yaml

from shared.config import StageConfig, kind_of
from shared.errors import UserError
from shared.io import files
from shared.recipe import read_recipe

# Of this invocation, not of the run.
_NOT_OF_THE_RUN = {"run", "recipe", "workspace", "overwrite", "shard_index", "num_shards"}

logger = logging.getLogger(__name__)


def record_recipe(config: StageConfig) -> None:
    """Write what was set for the run and for this stage; nothing where that is recorded already.

    A recipe that cannot be written does not end the work: it is logged.
    """
    path = config.paths.recipe
    if config.recipe is not None and config.recipe.absolute() == path.absolute():
        return
    try:
        given = read_recipe(config.recipe) if config.recipe else {}
        earlier = read_recipe(path) if path.exists() else {}
        recipe = {**given, **earlier}
        recipe["run"] = given.get("run", {}) | _as_set(config.run, set())
        recipe[config.section] = given.get(config.section, {}) | _own(config)
        if recipe == earlier:
            return
        same = recipe == given and config.recipe is not None
        text = (
            files.read_text(config.recipe)
            if same and config.recipe
            else yaml.safe_dump(recipe, sort_keys=False)
        )
        files.write_text(path, text)
    except UserError as error:
        logger.warning("the run's recipe is not recorded: %s", error)


def _as_set(settings: Any, without: set[str]) -> dict[str, Any]:
    values: dict[str, Any] = settings.model_dump(mode="json", exclude_unset=True, exclude=without)
    return values


def _own(config: StageConfig) -> dict[str, Any]:
    """The stage's settings; of one process among several only those that change the result."""
    own = _as_set(config, _NOT_OF_THE_RUN)
    if config.share.count == 1:
        return own
    fields = type(config).model_fields
    return {name: value for name, value in own.items() if kind_of(fields[name]) == "identity"}
