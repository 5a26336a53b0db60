# SPDX-License-Identifier: Apache-2.0
"""What the files of a run say about it: recipe, manifests, status files, logs; each is read once.

In: the folder of a run. Out: `RunState`, of which status, watch, triage, review, validate, estimates
and bench's lineage are views. Costs reading some small files; no log and no artifact is opened.

Whether a process lives is decided here and nowhere else. A process that was killed with SIGKILL
leaves a status that says "running" for ever. On the same host its process id tells. From another
host its heartbeat tells: a process that lives touches its status file every few seconds.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shared.artifacts.manifest import MANIFEST, read_manifest
from shared.artifacts.unfinished import started_identity
from shared.errors import EyrieError, UserError, nearest
from shared.paths import STAGES, RunPaths
from shared.recipe import read_recipe
from shared.runtime.process import is_alive
from shared.runtime.status import SILENT_AFTER_S, read_status

# bench, the quietest stage, writes nothing while an engine is measured, which may take hours.
_LONGEST_WAIT_S = 86_400.0
_OF_PROGRESS = ("done", "total", "unit", "left_s")
ENDED_BADLY = ("failed", "died", "stopped", "unreadable")
# What the chain and the stages write into a run's folder; each alone makes it one.
_MARKS = ("recipe.yaml", "status/*.json", f"*/{MANIFEST}")
# The worst first: a stage of several processes is what its worst process is.
_BY_URGENCY = ("failed", "died", "unreadable", "running", "stopped", "to do", "done", "skipped")


@dataclasses.dataclass(frozen=True)
class ProcessState:
    """One process of a stage.

    Attributes:
        name: the stage, or `synth-3` for the fourth of several processes.
        state: to do, skipped, running, done, failed, stopped, died or unreadable.
        message: what an operator should know about that state.
        record: the status file's JSON; empty where there is none that can be read.
        path: the status file, or None.
        seconds: from its start to its end, or to now while it runs.
    """

    name: str
    state: str
    message: str = ""
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    path: Path | None = None
    seconds: float | None = None

    @property
    def exit_code(self) -> int | None:
        return self.record.get("exit_code") if self.state != "running" else None

    @property
    def error(self) -> Mapping[str, Any] | None:
        """The parts of the error that ended it: code, problem, remedy, facts."""
        return self.record.get("error") if self.state in ("failed", "stopped") else None

    @property
    def progress(self) -> Mapping[str, Any]:
        return self.record.get("progress") or {}

    @property
    def total(self) -> int | None:
        return self.progress.get("total")

    @property
    def done(self) -> int | None:
        """How much of `total` is done; the last of it is not reported piece by piece."""
        return self.total if self.state == "done" else self.progress.get("done")

    @property
    def left_s(self) -> float | None:
        """As last reported, less the time since; None where it does not run."""
        left_s = self.progress.get("left_s")
        if self.state != "running" or left_s is None:
            return None
        return max(0.0, left_s - (time.time() - float(self.record["updated_s"])))

    @property
    def unit(self) -> str:
        return str(self.progress.get("unit", ""))

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage reports beside its progress: rates, loss, failures."""
        return {key: each for key, each in self.progress.items() if key not in _OF_PROGRESS}

    def as_dict(self) -> dict[str, Any]:
        """What an operator sees of it, as JSON values."""
        return {
            "name": self.name,
            "state": self.state,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "facts": self.facts,
            "spent_s": self.seconds,
            "left_s": self.left_s,
            "message": self.message,
        }


class RunState:
    """One look at a run."""

    def __init__(self, paths: RunPaths) -> None:
        self.paths = paths
        self._manifests: dict[str, dict[str, Any] | None] = {}

    @functools.cached_property
    def recipe_path(self) -> Path | None:
        """The run's own copy, else the file that one of its stages was given."""
        given = [state.record.get("recipe") for state in self.stages.values()]
        for path in (self.paths.recipe, *(Path(name) for name in given if name)):
            if path.is_file():
                return path
        return None

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe's sections; empty where there is none that can be read."""
        try:
            return read_recipe(self.recipe_path) if self.recipe_path else {}
        except UserError:  # validate reports what is wrong with it
            return {}

    @functools.cached_property
    def logs(self) -> list[Path]:
        """In the chain's order."""
        found = sorted((self.paths.root / "logs").glob("*.log"))
        return sorted(found, key=lambda path: _position(path.stem))

    def manifest(self, artifact: str) -> dict[str, Any] | None:
        """The artifact's manifest, or None where it is not finished.

        Raises:
            UserError: it cannot be understood.
        """
        if artifact not in self._manifests:
            self._manifests[artifact] = read_manifest(self.paths.root / artifact)
        return self._manifests[artifact]

    def seconds(self, stage: str) -> float | None:
        """From the start of a finished stage to its manifest; None where its status is gone.

        Raises:
            UserError: the manifest cannot be understood.
        """
        manifest = self.manifest(stage)
        started_s = [float(p.record["started_s"]) for p in self.processes(stage) if p.record]
        ended_s = None if manifest is None else _finished_s(manifest)
        return max(0.0, ended_s - min(started_s)) if ended_s and started_s else None

    def processes(self, stage: str) -> list[ProcessState]:
        """The stage's processes; one that is "to do" or "done" where no status file is there."""
        folder, own = self.paths.root / "status", re.compile(rf"{stage}(-\d+)?\.json")
        files = [path for path in sorted(folder.glob(f"{stage}*.json")) if own.fullmatch(path.name)]
        finished_s = self._finished_s(stage)
        found = _without_history([_read(path, finished_s) for path in files], finished_s)
        if not found and stage in self.skipped:
            return [ProcessState(stage, "skipped", "what came after it was made without it")]
        return found or [ProcessState(stage, "to do" if finished_s is None else "done")]

    def _finished_s(self, stage: str) -> float | None:
        """When the stage's manifest says that it was finished: a copy's file time is the copy's."""
        path = self.paths.stage(stage) / MANIFEST
        try:
            manifest = self.manifest(stage)
            return None if manifest is None else _finished_s(manifest) or _written_s(path)
        except UserError:  # validate reports what is wrong with it
            return _written_s(path)

    @functools.cached_property
    def skipped(self) -> frozenset[str]:
        """The stages before the first that began, where that one names no parent.

        Worked example: dump --conversations needs no answers of synth, and bench of a published head
        neither synth nor dump nor train.
        """
        untouched = [*itertools.takewhile(self._is_untouched, STAGES)]
        if not untouched or len(untouched) == len(STAGES):
            return frozenset()
        try:
            identity = started_identity(self.paths.stage(STAGES[len(untouched)]))
        except UserError:  # validate reports what is wrong with it
            return frozenset()
        if identity is None or any(key.startswith("parent.") for key in identity):
            return frozenset()
        return frozenset(untouched)

    def _is_untouched(self, stage: str) -> bool:
        folder = self.paths.stage(stage)
        has_status = any(self.paths.root.glob(f"status/{stage}*.json"))
        return not (has_status or folder.exists() or folder.is_symlink())

    @functools.cached_property
    def stages(self) -> dict[str, ProcessState]:
        """Each stage's most urgent process; done where the artifact is, and nothing failed since."""
        worst: dict[str, ProcessState] = {}
        for stage in STAGES:
            found = min(self.processes(stage), key=lambda each: _BY_URGENCY.index(each.state))
            is_finished = (self.paths.stage(stage) / MANIFEST).exists()
            if is_finished and found.state in ("died", "stopped", "to do"):
                found = dataclasses.replace(found, state="done")
            worst[stage] = found
        return worst


def find_run(
    name: str, workspace: Path, *, is_other: Callable[[Path], bool] = lambda _: False
) -> RunPaths:
    """The run that a name in the workspace, or a folder, means.

    Args:
        is_other: whether a folder is another thing that the caller takes.

    Raises:
        UserError: there is none.
    """
    for folder in (workspace / name, Path(name)) if name else ():
        with contextlib.suppress(OSError, ValueError):  # what can be no file's name
            if folder.is_dir() and (_is_run(folder) or is_other(folder)):
                absolute = folder.absolute()
                return RunPaths(absolute.parent, absolute.name)
    found = {
        path.relative_to(workspace).parts[0]
        for mark in _MARKS
        for path in workspace.glob(f"*/{mark}")
    }
    raise UserError(
        f"expected the folder of a run at {workspace / name}, found none.",
        code="run-missing",
        remedy=nearest(name, sorted(found)) if found else "There is no run in this workspace.",
        facts={"run": name, "workspace": str(workspace), "runs": sorted(found)},
    )


def _finished_s(manifest: Mapping[str, Any]) -> float | None:
    """When an artifact was finished, in seconds since 1970; None where its manifest has no such time."""
    try:
        return datetime.datetime.fromisoformat(manifest["provenance"]["finished"]).timestamp()
    except (KeyError, ValueError, OverflowError):
        return None


def _is_run(folder: Path) -> bool:
    return any(next(folder.glob(mark), None) is not None for mark in _MARKS)


def _position(name: str) -> int:
    stage = name.partition("-")[0]
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def _written_s(path: Path) -> float | None:
    """When a file was written, in seconds since 1970; None where it is not there, or no longer."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _looked_at(path: Path) -> tuple[dict[str, Any], str]:
    """What a status file says, and how its process is known to be gone; "" where it may well run.

    A process that ended well between the two has said so meanwhile: then its last word counts.
    """
    while True:
        record = read_status(path)
        age_s = time.time() - path.stat().st_mtime
        reason = _reason_of_death(record, age_s) if record["state"] == "running" else ""
        if not reason or read_status(path) == record:
            return record, reason


def _read(path: Path, finished_s: float | None) -> ProcessState:
    """The process of one status file.

    Args:
        finished_s: when the stage was finished, in seconds since 1970.
    """
    try:
        record, reason = _looked_at(path)
    except (EyrieError, OSError) as error:
        return ProcessState(path.stem, "unreadable", f"{path}: {error}", path=path)
    state, message = record["state"], str(record.get("message", ""))
    if reason:
        state, message = "died", reason
    end_s = time.time() if state == "running" else float(record["updated_s"])
    if state == "done" and finished_s:
        # A stage that was run again found its work done, and only its status is newer.
        end_s = min(end_s, finished_s)
    seconds = max(0.0, end_s - float(record["started_s"]))
    return ProcessState(path.stem, state, message, record, path, seconds)


def _reason_of_death(record: Mapping[str, Any], age_s: float) -> str:
    """How a process that says "running" is known to be gone; "" where it may well run."""
    remedy = "Run the same command again: it continues."
    host, pid = record["host"], record["pid"]
    is_here = host == socket.gethostname()
    if is_here and not (pid > 0 and is_alive(pid)):
        return f"its process {pid} is gone and left no error. {remedy}"
    silent_s = age_s
    if not is_here and time.time() - record["updated_s"] > _LONGEST_WAIT_S:
        silent_s = time.time() - record["updated_s"]  # a copied run: the file's time is the copy's
    if silent_s > SILENT_AFTER_S:
        return f"silent for {silent_s:.0f} s: its process on {host} was killed, or hangs. {remedy}"
    return ""


def _without_history(found: list[ProcessState], finished_s: float | None) -> list[ProcessState]:
    """Without what ended badly in an earlier try: before the artifact, or of another share count."""
    dated = [each for each in found if each.record]
    if not dated:
        return found
    newest = max(dated, key=lambda each: float(each.record["updated_s"]))

    def is_history(each: ProcessState) -> bool:
        if each.state not in ENDED_BADLY or each.path is None or not each.record:
            return False
        if finished_s is not None and float(each.record["updated_s"]) <= finished_s:
            return True
        return _share_count(each) != _share_count(newest)

    return [each for each in found if not is_history(each)]


def _share_count(process: ProcessState) -> int | None:
    """How many processes shared the stage; None where the status does not say."""
    count = process.record.get("num_shards")
    if isinstance(count, int):
        return count
    return None if "-" in process.name else 1
