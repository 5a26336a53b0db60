# SPDX-License-Identifier: Apache-2.0
"""The two recipes of an adaptation, made of the user's: the old head's bench, and the new head's run.

A recipe that adapt wrote says so in its first line; one that does not is somebody's, and stays.
"""

from pathlib import Path
from typing import Any

import yaml

from shared.contracts.head_folder import Head
from shared.errors import UserError
from shared.io import files
from shared.paths import RunPaths
from stages.ops.adapt.traffic import HELD_OUT, TRAIN, Split

Recipe = dict[str, dict[str, Any]]

MARK = (
    "# Written by `ops adapt`, anew each time: change the recipe that you give it, not this one.\n"
)
# bench's own gates are for a head by itself; here the new head is compared with the old one.
_NO_GATES = {"min_acceptance_length": 0, "min_gain_over_ngram": None, "min_speedup": None}
# Settings that have another head measured, or other rows learnt from, than those of the command.
_NOT_HERE = {
    "synth": ("sources",),
    "dump": ("conversations", "states"),
    "train": ("dump_of", "init_from"),
    "bench": ("head", "head_revision", "endpoint", "baseline_endpoint", "earlier_report"),
}


def rows_folder(paths: RunPaths) -> Path:
    """Where a run keeps the split of its traffic."""
    return paths.root / "traffic"


def require_free(recipe: Recipe, path: Path) -> None:
    """Refuse a recipe that would turn the comparison into another one.

    Raises:
        UserError: with every setting of that kind.
    """
    found = [
        f"{section}.{name}"
        for section, names in _NOT_HERE.items()
        for name in names
        if recipe.get(section, {}).get(name)
    ]
    if found:
        raise UserError(
            f"{path}: expected no {', '.join(found)}: adapt gives the rows to learn from by --traffic, and "
            "measures the head of --head and the new one.",
            code="adapt-recipe",
            remedy="Take it out of the recipe.",
            facts={"settings": found},
        )


def require_own(given: Path, *runs: RunPaths) -> None:
    """Refuse to write over a recipe or rows that adapt has not written.

    Raises:
        UserError: one of the runs is somebody else's.
    """
    for paths in runs:
        if not paths.recipe.exists():
            rows = [rows_folder(paths) / name for name in (TRAIN, HELD_OUT)]
            found = next((path for path in rows if path.exists()), None)
        elif paths.recipe.samefile(given) or not files.read_text(paths.recipe).startswith(MARK):
            found = paths.recipe
        else:
            found = None
        if found is not None:
            raise UserError(
                f"run {paths.run_name}: expected none yet, or one that adapt has begun, found {found}, which "
                "it has not written.",
                code="adapt-run-taken",
                remedy="Give the recipe another run.name, and keep it outside that run's folder.",
                facts={"found": str(found)},
            )


def recipe_before(recipe: Recipe, paths: RunPaths, head: Head, rows: Split) -> Recipe:
    """That of the old head's bench."""
    only_the_head = {"compare_baseline": False, "compare_ngram": False, "max_wrong_answers": None}
    bench = _bench(recipe, paths, rows) | only_the_head
    bench["head"] = _within(paths, head.folder)
    return {"run": _run_section(recipe, paths, head), "bench": bench}


def recipe_after(recipe: Recipe, paths: RunPaths, head: Head, rows: Split) -> Recipe:
    """That of the new head's run."""
    return {
        "run": _run_section(recipe, paths, head),
        "synth": {**recipe.get("synth", {}), "prompts": _within(paths, rows.train)},
        "dump": recipe.get("dump", {}),
        "train": {
            "init_vocabulary": "redraw",
            **recipe.get("train", {}),
            "init_from": _within(paths, head.folder),
        },
        "bench": _bench(recipe, paths, rows),
    }


def _run_section(recipe: Recipe, paths: RunPaths, head: Head) -> dict[str, Any]:
    """The recipe's, with the settings that a warm start takes over from the head."""
    section = {**recipe["run"], "name": paths.run_name, "draft_vocab_size": head.draft_vocab_size}
    if head.aux_layers:
        section.setdefault("aux_layers", head.aux_layers)
    return section


def _bench(recipe: Recipe, paths: RunPaths, rows: Split) -> dict[str, Any]:
    return {**recipe.get("bench", {}), **_NO_GATES, "prompts": _within(paths, rows.held_out)}


def _within(paths: RunPaths, path: Path) -> str:
    """Relative to the workspace where it lies there, so that the recipe holds in a container too."""
    path, workspace = path.absolute(), paths.workspace.absolute()
    return str(path.relative_to(workspace) if path.is_relative_to(workspace) else path)


def write(path: Path, recipe: Recipe) -> None:
    """A recipe with the mark of adapt."""
    files.write_text(path, MARK + yaml.safe_dump(recipe, sort_keys=False))
