# SPDX-License-Identifier: Apache-2.0
"""Which logs there are, whose they are, and what else is known before one is opened.

In: a run's folder, a ModelOpt launcher's experiment folder (task_0 to task_3), or single logs. Out: a
`Case`: the logs in the chain's order, the state of each stage, and the recipe's settings.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.artifacts.process_state import ProcessState
from shared.artifacts.run_state import RunState
from shared.errors import EXIT_DONE, EXIT_STOPPED, UserError
from shared.paths import STAGES, RunPaths
from stages.ops.chain.processes import run_paths

_LOG_NAMES = ("*.log", "*.out", "*.err")
_TASK = re.compile(r"(?:^|[^a-z0-9])task_?([0-3])(?:$|[^0-9])", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class LogFile:
    """A log, and the stage that wrote it where its name says so."""

    path: Path
    stage: str | None


@dataclasses.dataclass
class Case:
    """Everything that is known before a log is opened.

    Attributes:
        kind: run, launcher or logs.
        exit_codes: given by the operator; they go before what the files say.
    """

    kind: str
    root: Path | None
    logs: list[LogFile]
    run: RunState | None = None
    exit_codes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def state(self, stage: str | None) -> ProcessState:
        """The stage's state, "to do" where nothing is known."""
        if stage is not None and stage in self.exit_codes:
            code = self.exit_codes[stage]
            state = {EXIT_DONE: "done", EXIT_STOPPED: "stopped"}.get(code, "failed")
            return ProcessState(stage, state, record={"exit_code": code})
        if self.run is None or stage not in STAGES:
            return ProcessState(stage or "", "to do")
        return self.run.stages[stage]

    def setting(self, key: str) -> Any:
        """The recipe's value of `section.name`; None where it does not set it."""
        section, _, name = key.partition(".")
        return self.run.recipe.get(section, {}).get(name) if self.run else None


def open_case(
    paths: Sequence[Path],
    *,
    recipe: Path | None,
    workspace: Path,
    exit_codes: Mapping[str, int],
) -> Case:
    """The case of a recipe's run, of one folder, or of the logs given.

    Raises:
        UserError: nothing given, a path that does not exist, a folder without logs.
    """
    if recipe is not None:
        paths = [*paths, run_paths(recipe, workspace).root]
    if not paths:
        raise UserError("expected --recipe, --folder or logs, found none.", code="no-logs-given")
    for path in paths:
        if not path.exists():
            raise UserError(
                f"expected a log, or a folder of logs, at {path}, found none.", code="log-missing"
            )
    folders = [path for path in paths if path.is_dir()]
    if len(folders) > 1:
        raise UserError(
            f"expected one run's folder, found {', '.join(map(str, folders))}.",
            code="several-runs-given",
        )
    case = _open_folder(folders[0], recipe) if folders else Case("logs", None, [])
    case.exit_codes = exit_codes
    case.logs += [
        LogFile(path, _stage_of(Path(*path.parts[-2:]))) for path in paths if path.is_file()
    ]
    if not case.logs and not (case.run and any(case.state(stage).path for stage in STAGES)):
        raise UserError(
            f"{folders[0]}: expected logs ({', '.join(_LOG_NAMES)}), found none.",
            code="log-missing",
        )
    return case


def _open_folder(folder: Path, recipe: Path | None) -> Case:
    if any((folder / name).is_dir() for name in ("logs", "status")):
        absolute = folder.absolute()
        run = RunState(RunPaths(absolute.parent, absolute.name))
        if run.recipe_path is None and recipe is not None:
            run.recipe_path = recipe
        return Case("run", folder, [LogFile(path, _stage_of(path)) for path in run.logs], run)
    logs = sorted({path for name in _LOG_NAMES for path in folder.rglob(name) if path.is_file()})
    relative = {path: path.relative_to(folder) for path in logs}
    is_launchers = any(_TASK.search(str(name)) for name in relative.values())
    found = [LogFile(path, _stage_of(name)) for path, name in relative.items()]
    return Case("launcher" if is_launchers else "logs", folder, found)


def _stage_of(path: Path) -> str | None:
    """The stage that a log's name, or a folder above it, names.

    Worked example: `logs/dump-1.log` is dump's, `task_2/sbatch_77.out` is train's.
    """
    for part in reversed(path.parts):
        if task := _TASK.search(part):
            return STAGES[int(task[1])]
        words = re.split(r"[^a-z]+", part.lower())
        for stage in STAGES:
            if stage in words:
                return stage
    return None
