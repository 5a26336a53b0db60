# SPDX-License-Identifier: Apache-2.0
"""Is everything in this run what it says it is?

In: the folder of a run, or of a ModelOpt launcher's experiment, of which only the logs are read.
Out: a table of questions and verdicts; as Markdown and JSON on demand.
Exit 0 where all passed, 3 where one failed, 2 where there is no such run. Cost: every file is read
once for its checksum; 64 MiB of states a shard. Nothing is changed.
"""

import functools
import json
import sys
from collections.abc import Callable

from rich.console import Console

from shared.artifacts.manifest import MANIFEST
from shared.artifacts.run_state import find_run
from shared.config import RunConfig
from shared.errors import EXIT_DONE, EXIT_OUTPUT
from shared.io import files
from shared.recipe import read_recipe
from shared.target.model import weights_hash
from stages.ops.config import ValidateConfig
from stages.ops.look.validate import artifacts, check_bench, check_dump, check_synth, check_train
from stages.ops.look.validate.artifacts import ARTIFACTS, MAKER, RunView
from stages.ops.look.validate.findings import FAIL, Findings, Skipped, Wrong
from stages.ops.look.validate.launcher import is_experiment, validate_experiment

Question = tuple[str, Callable[[RunView], str]]

_OF_EACH: tuple[tuple[str, Callable[[RunView, str], str]], ...] = (
    ("settings", artifacts.ask_settings),
    ("files", artifacts.ask_files),
    ("counts", artifacts.ask_counts),
    ("lineage", artifacts.ask_lineage),
)
_OF_ONE: dict[str, tuple[Question, ...]] = {
    "synth": (("rows", check_synth.ask_rows),),
    "dump": (
        ("data_config", check_dump.ask_data_config),
        ("capture", check_dump.ask_capture),
        ("sidecars", check_dump.ask_sidecars),
        ("states", check_dump.ask_states),
        ("rows", check_dump.ask_same_rows),
    ),
    "train": (
        ("loss", check_train.ask_loss),
        ("walk", check_train.ask_walk),
        ("vocabulary", check_train.ask_vocabulary),
        ("checkpoint", check_train.ask_checkpoint),
    ),
    "export": (
        ("keys and shapes", check_train.ask_export),
        ("weights", check_train.ask_exported_weights),
        ("model card", check_train.ask_card),
    ),
    "bench": (
        ("gates", check_bench.ask_gates),
        ("figures", check_bench.ask_figures),
        ("head", check_bench.ask_head),
        ("page", check_bench.ask_page),
    ),
}


def run(config: ValidateConfig) -> int:
    """Ask everything, show it; the exit code."""
    paths = find_run(config.name, config.workspace, is_other=is_experiment)
    if is_experiment(paths.root):
        found = validate_experiment(paths.root, config.only, config.min_acceptance_length)
    else:
        names = [name for name in ARTIFACTS if MAKER.get(name, name) in config.only]
        found = validate(RunView(paths, checksums=config.checksums), names)
    name = paths.run_name
    if config.out is not None:
        files.write_text(config.out, found.as_markdown(name))
    if config.as_json:
        sys.stdout.write(json.dumps(found.as_json(name), indent=2) + "\n")
    else:
        found.show(name, Console(width=None if sys.stdout.isatty() else 160))
    return EXIT_OUTPUT if found.verdict == FAIL else EXIT_DONE


def validate(view: RunView, names: list[str]) -> Findings:
    """All questions about these artifacts."""
    findings = Findings()
    findings.ask("run", "recipe", functools.partial(_ask_recipe, view))
    for name in names:
        if not findings.ask(name, "manifest", functools.partial(_ask_manifest, view, name)):
            continue
        if name in view.skipped:
            continue
        for question, of_each in _OF_EACH:
            findings.ask(name, question, functools.partial(of_each, view, name))
        for question, of_one in _OF_ONE[name]:
            findings.ask(name, question, functools.partial(of_one, view))
    if "dump" in names or "bench" in names:
        findings.ask("run", "target", functools.partial(_ask_target, view, names))
    return findings


def _ask_recipe(view: RunView) -> str:
    """The kept recipe is one, and names the target that the artifacts were made for."""
    if not view.paths.recipe.exists():
        raise Skipped("the run's folder holds no recipe; its artifacts keep their own settings")
    recipe = read_recipe(view.paths.recipe)
    unknown = recipe.get("run", {}).keys() - RunConfig.model_fields.keys()
    if unknown:
        raise Wrong(f"{view.paths.recipe}: unknown keys in run: {sorted(unknown)}.")
    return f"sections {', '.join(recipe)}"


def _ask_manifest(view: RunView, name: str) -> str:
    """As for each artifact; a bench that missed a gate has a report, and no manifest for it."""
    if name in view.skipped:
        raise Skipped("what came after it was made without it")
    unfinished = not (view.folder(name) / MANIFEST).exists()
    if name == "bench" and unfinished and view.paths.report.exists():
        check_bench.ask_gates(view)
    return artifacts.ask_manifest(view, name)


def _ask_target(view: RunView, names: list[str]) -> str:
    """The target on this disk is still the one that the artifacts were made with."""
    for name in (name for name in names if name not in view.skipped):
        digest = view.manifest(name)["identity"].get("input.target")
        target = view.target(name)
        if digest is None:
            continue
        if target is None:
            raise Skipped("the target does not lie in the workspace")
        if weights_hash(target.folder) != digest:
            raise Wrong(
                f"{target.folder} changed since {name} was made with it. Restore it, or run "
                f"{name} again with --overwrite."
            )
    return "unchanged"
