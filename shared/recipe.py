# SPDX-License-Identifier: Apache-2.0
"""A recipe, read: one YAML file with the section `run` and one section for each stage."""

import reprlib
from pathlib import Path
from typing import Any

from shared.errors import UserError, nearest
from shared.io import recipe_yaml
from shared.io.files import read_text
from shared.paths import STAGES

SECTIONS = ("run", *STAGES)
_REMEDY = "Give its path as this process sees it; in a container that is below /workspace."


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe as a dict of sections.

    Raises:
        UserError: missing, not YAML, or a section nobody knows.
    """
    try:
        recipe = recipe_yaml.parse(read_text(path))
    except UserError as error:
        raise UserError(
            f"--recipe: {error.problem}", code="recipe-unreadable", remedy=_REMEDY
        ) from error
    except recipe_yaml.RecipeError as error:
        raise _bad_recipe(f"--recipe: {path} is not valid YAML: {error}.") from error
    if not isinstance(recipe, dict):
        raise _bad_recipe(f"{path}: expected sections ({', '.join(SECTIONS)}), found no mapping.")
    for name, section in recipe.items():
        if name not in SECTIONS:
            raise UserError(
                f"{path}: unknown section {name!r}.",
                code="recipe-section",
                remedy=nearest(str(name), SECTIONS),
            )
        if not isinstance(section, dict | None):
            raise _bad_recipe(
                f"{path}: section {name}: expected keys and values, found {reprlib.repr(section)}."
            )
    return {name: section or {} for name, section in recipe.items()}


def _bad_recipe(problem: str) -> UserError:
    return UserError(
        problem,
        code="recipe-invalid",
        remedy="Correct it; compose/recipes/demo/recipe.yaml shows the shape.",
    )
