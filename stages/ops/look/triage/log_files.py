# SPDX-License-Identifier: Apache-2.0
"""Which logs there are, whose they are, and what else the files of a run tell.

In: a run's folder, a ModelOpt launcher's experiment folder (task_0 to task_3), or single logs. Out:
a `Case`: the logs in the chain's order, and of each stage its state and exit code. Reads a handful
of small files. A stage whose status says "running" and whose process is gone has *vanished*: nothing
but a signal that cannot be caught ends a stage without a word.
"""

import dataclasses
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.artifacts.manifest import MANIFEST
from shared.config import RunConfig, read_recipe
from shared.errors import UserError
from shared.io import files
from shared.paths import STAGES, RunPaths
from shared.runtime.process import is_alive
from shared.runtime.status import SILENT_AFTER_S
from stages.ops.look.triage.failure_rules import State

# bench, the quietest stage, tells nothing new until an engine is measured, for hours maybe.
_LONGEST_WAIT_S = 86_400.0
_LOG_NAMES = ("*.log", "*.out", "*.err")
_TASK = re.compile(r"(?:^|[^a-z0-9])task_?([0-3])(?:$|[^0-9])", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class LogFile:
    """A log, and the stage that wrote it where its name tells."""

    path: Path
    stage: str | None


@dataclasses.dataclass
class StageFacts:
    """What a stage's files say about it, its logs aside."""

    state: State = "missing"
    exit_code: int | None = None
    message: str = ""
    status: Path | None = None
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Case:
    """Everything that is known before a log is opened."""

    kind: str  # run, launcher, logs
    root: Path | None
    logs: list[LogFile]
    stages: dict[str, StageFacts]
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe_path: Path | None = None
    workspace: Path | None = None

    def setting(self, key: str, default: Any = None) -> Any:
        """The recipe's value of `section.name`, or `default`."""
        section, _, name = key.partition(".")
        return self.recipe.get(section, {}).get(name, default)


def open_case(
    paths: Sequence[Path],
    *,
    recipe: Path | None,
    workspace: Path,
    exit_codes: Mapping[str, int],
) -> Case:
    """The case of a recipe's run, of one folder, or of the logs given.

    Raises:
        UserError: nothing given, a path that is not there, a folder without logs.
    """
    if recipe is not None:
        name = (
            read_recipe(recipe).get("run", {}).get("name", RunConfig.model_fields["name"].default)
        )
        paths = [*paths, RunPaths(workspace, str(name)).root]
    if not paths:
        raise UserError("give --recipe, --folder, or the logs to read.")
    for path in paths:
        if not path.exists():
            raise UserError(f"expected a log, or a folder of logs, at {path}, found none.")
    folders = [path for path in paths if path.is_dir()]
    if len(folders) > 1:
        raise UserError(f"expected one run's folder, found {', '.join(map(str, folders))}.")
    case = _open_folder(folders[0]) if folders else Case("logs", None, [], {})
    case.logs += [
        LogFile(path, _stage_of(Path(*path.parts[-2:]))) for path in paths if path.is_file()
    ]
    for stage, code in exit_codes.items():
        facts = case.stages.setdefault(stage, StageFacts())
        facts.exit_code, facts.state = code, _state_of(code)
    if not case.logs and not any(facts.status for facts in case.stages.values()):
        raise UserError(f"{folders[0]}: expected logs ({', '.join(_LOG_NAMES)}), found none.")
    return case


def _state_of(exit_code: int) -> State:
    return "done" if exit_code == 0 else "stopped" if exit_code == 143 else "failed"


def _open_folder(folder: Path) -> Case:
    if any((folder / name).is_dir() for name in ("logs", "status")):
        return _open_run(folder)
    logs = sorted({path for name in _LOG_NAMES for path in folder.rglob(name) if path.is_file()})
    found = [LogFile(path, _stage_of(path.relative_to(folder))) for path in logs]
    kind = (
        "launcher" if any(_TASK.search(str(log.path.relative_to(folder))) for log in found) else ""
    )
    return Case(kind or "logs", folder, found, {})


def _open_run(folder: Path) -> Case:
    paths = RunPaths(folder.parent, folder.name)
    order = {stage: position for position, stage in enumerate(STAGES)}
    logs = [LogFile(path, _stage_of(path)) for path in sorted((folder / "logs").glob("*.log"))]
    logs.sort(key=lambda log: order.get(log.stage or "", len(order)))
    stages = {stage: _facts(paths, stage) for stage in STAGES}
    recipe = paths.recipe if paths.recipe.is_file() else None
    try:
        sections = read_recipe(recipe) if recipe else {}
    except UserError:  # what is wrong with it is for the stages' own logs to say
        sections = {}
    return Case("run", folder, logs, stages, sections, recipe, folder.parent)


def _stage_of(path: Path) -> str | None:
    """The stage that a log's name or a folder above it tells.

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


def _facts(paths: RunPaths, stage: str) -> StageFacts:
    """A stage's state from its manifest and its status file, or files where several shared it."""
    manifest = paths.stage(stage) / MANIFEST
    finished_s = manifest.stat().st_mtime if manifest.is_file() else None
    found = [
        facts
        for path in _status_files(paths, stage)
        if (facts := _read_status(path)).state not in ("failed", "vanished", "stopped")
        or finished_s is None
        or path.stat().st_mtime > finished_s  # an earlier try, with other shares, is history
    ]
    worst = min(found, key=lambda facts: _URGENCY.index(facts.state), default=StageFacts())
    if finished_s is not None and worst.state not in ("running", "failed"):
        worst.state = "done"
    return worst


_URGENCY: tuple[State, ...] = ("failed", "vanished", "running", "stopped", "missing", "done")


def _status_files(paths: RunPaths, stage: str) -> list[Path]:
    own = paths.status(stage)
    return sorted(path for path in (own, *own.parent.glob(f"{stage}-*.json")) if path.is_file())


def _read_status(path: Path) -> StageFacts:
    try:
        record = files.read_json(path)
    except UserError:
        record = None
    if not isinstance(record, dict):
        return StageFacts(status=path)
    state, code = record.get("state"), record.get("exit_code")
    facts = StageFacts(
        "missing", status=path, record=record, message=str(record.get("message", ""))
    )
    if state == "running":
        facts.state = "running" if _lives(record, path) else "vanished"
        facts.message = ""
    elif isinstance(code, int):
        facts.state, facts.exit_code = _state_of(code), code
    return facts


def _lives(record: Mapping[str, Any], path: Path) -> bool:
    if record.get("host") != socket.gethostname():
        # Its heartbeat touches the file; but a copy's time is that of copying.
        updated_s = record.get("updated_s")
        is_old = isinstance(updated_s, int | float) and time.time() - updated_s > _LONGEST_WAIT_S
        return not is_old and time.time() - path.stat().st_mtime <= SILENT_AFTER_S
    pid = record.get("pid")
    return isinstance(pid, int) and pid > 0 and is_alive(pid)
