# SPDX-License-Identifier: Apache-2.0
"""One process of a stage, by its status file: how far it is, how it ended, whether it lives.

Whether a process lives is decided here and nowhere else. A process that was killed with SIGKILL
leaves a status that says "running" for ever. On the same host its process id tells. From another
host its heartbeat tells: a process that lives touches its status file every few seconds.
"""

import dataclasses
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import EyrieError
from shared.runtime.process import is_alive
from shared.runtime.status import SILENT_AFTER_S, read_status

# bench, the quietest stage, writes nothing while an engine is measured, which may take hours.
_LONGEST_WAIT_S = 86_400.0
_OF_PROGRESS = ("done", "total", "unit", "left_s")
ENDED_BADLY = ("failed", "died", "stopped", "unreadable")


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


def read_process(path: Path, finished_s: float | None) -> ProcessState:
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


def without_history(found: list[ProcessState], finished_s: float | None) -> list[ProcessState]:
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
