# SPDX-License-Identifier: Apache-2.0
"""What the files of a run say about it: recipe, manifests, status files, logs; each is read once.

In: the folder of a run. Out: `RunState`, of which status, watch, triage, review, validate, estimates
and bench's lineage are views. Costs reading some small files; no log and no artifact is opened.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shared.artifacts.manifest import MANIFEST, read_manifest
from shared.artifacts.process_state import ProcessState, read_process, without_history
from shared.artifacts.unfinished import started_identity
from shared.errors import UserError, nearest
from shared.paths import STAGES, RunPaths
from shared.recipe import read_recipe

# What the chain and the stages write into a run's folder; each alone makes it one.
_MARKS = ("recipe.yaml", "status/*.json", f"*/{MANIFEST}")
# The worst first: a stage of several processes is what its worst process is.
_BY_URGENCY = ("failed", "died", "unreadable", "running", "stopped", "to do", "done", "skipped")


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
        found = without_history([read_process(path, finished_s) for path in files], finished_s)
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
