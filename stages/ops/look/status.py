# SPDX-License-Identifier: Apache-2.0
"""How far is each stage of a run? Read from its status files and manifests alone.

In: the folder of a run. Out: a table, once or live, or JSON. Costs reading some small files.
The surprise: a process that was killed with SIGKILL leaves a file that says "running" for ever. It
is told by its process id where that can be seen (the same host), else by the file's age: a process
that lives touches it every few seconds.
"""

import dataclasses
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from shared.artifacts.manifest import MANIFEST
from shared.errors import EyrieError
from shared.paths import STAGES, RunPaths
from shared.runtime.process import is_alive, stop_requested
from shared.runtime.status import SILENT_AFTER_S, read_status
from shared.runtime.tables import cell
from stages.ops.config import StatusConfig, WatchConfig
from stages.ops.look.run_folder import find_run

_COLOURS = {
    "done": "green",
    "running": "cyan",
    "died": "bold red",
    "failed": "bold red",
    "stopped": "yellow",
    "unreadable": "bold red",
}
# After one of these the chain goes on only when somebody starts it again.
_ENDED = {"failed", "died", "stopped", "unreadable"}
_OF_PROGRESS = ("done", "total", "unit", "left_s")


@dataclasses.dataclass(frozen=True)
class StageState:
    """One process of a stage, as an operator sees it.

    Attributes:
        name: the stage; `synth-3` is the fourth of several processes.
        state: to do, running, done, failed, stopped, died, unreadable.
        facts: what the stage tells beside its progress: rates, loss, failures.
        spent_s: from its start to its end, or to now while it runs.
        left_s: as it last said, less what has passed since.
    """

    name: str
    state: str
    done: int | None = None
    total: int | None = None
    unit: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    spent_s: float | None = None
    left_s: float | None = None
    message: str = ""


def run(config: StatusConfig) -> None:
    """Show the states once."""
    paths = find_run(config.name, config.workspace)
    states = read_states(paths)
    if config.as_json:
        _print_json(paths, states)
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(_table(paths, states))


def watch(config: WatchConfig) -> None:
    """Show the states until all is done, or nothing works on what is left, or a signal ends it."""
    paths = find_run(config.name, config.workspace)
    if config.as_json:
        for states in _looks(paths, config.period_s):
            _print_json(paths, states)
        return
    with Live(console=Console(), auto_refresh=False) as live:
        for states in _looks(paths, config.period_s):
            live.update(_table(paths, states), refresh=True)


def _looks(paths: RunPaths, period_s: float) -> Iterator[list[StageState]]:
    """The states, again and again, for as long as they can change by themselves."""
    while True:
        states = read_states(paths)
        yield states
        found = {state.state for state in states}
        if found == {"done"} or (found & _ENDED and "running" not in found):
            return
        until = time.monotonic() + period_s
        while time.monotonic() < until:
            if stop_requested():
                return
            time.sleep(min(0.1, period_s))


def read_states(paths: RunPaths) -> list[StageState]:
    """Every stage's state, in order; a stage of several processes has one for each."""
    states = []
    for stage in STAGES:
        named = sorted((paths.root / "status").glob(f"{stage}*.json"))
        own = [path for path in named if path.stem.rpartition("-")[0] in ("", stage)]
        manifest = paths.stage(stage) / MANIFEST
        finished = manifest.stat().st_mtime if manifest.exists() else None
        if not own:
            states.append(StageState(stage, "done" if finished else "to do"))
        states += [_read(path, finished) for path in own]
    return states


def _read(path: Path, finished: float | None) -> StageState:
    """One status file; `finished` is when the stage's manifest was written."""
    try:
        record = read_status(path)
        age_s = time.time() - path.stat().st_mtime
        state, message = record["state"], str(record.get("message", ""))
        if state == "running" and (why := _death(record, age_s)):
            state, message = "died", why
        progress = record.get("progress") or {}
        running = state == "running"
        now_s = time.time() if running else float(record["updated_s"])
        done, total, left_s = (progress.get(key) for key in ("done", "total", "left_s"))
        if running and left_s is not None:
            left_s = max(0.0, left_s - (now_s - float(record["updated_s"])))
        if state == "done" and finished:
            done = total  # the last rows are not told one by one
            # A stage that was run again found its work done, and only its status is newer.
            now_s = min(now_s, finished)
        return StageState(
            path.stem,
            state,
            done,
            total,
            str(progress.get("unit", "")),
            {key: value for key, value in progress.items() if key not in _OF_PROGRESS},
            max(0.0, now_s - float(record["started_s"])),
            left_s if running else None,
            message,
        )
    except (EyrieError, OSError) as error:
        return StageState(path.stem, "unreadable", message=f"{path}: {error}")


def _death(record: dict[str, Any], age_s: float) -> str:
    """How a process that says "running" is known to be gone; "" where it may well run."""
    remedy = "Run the same command again: it continues."
    if record.get("host") == socket.gethostname() and not is_alive(int(record["pid"])):
        return f"its process {record['pid']} is gone, and it did not say why. {remedy}"
    if age_s > SILENT_AFTER_S:
        host = record.get("host", "an unknown host")
        return f"silent for {age_s:.0f} s: its process on {host} was killed, or hangs. {remedy}"
    return ""


def _print_json(paths: RunPaths, states: list[StageState]) -> None:
    record = {"run": paths.run_name, "stages": [dataclasses.asdict(state) for state in states]}
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def _table(paths: RunPaths, states: list[StageState]) -> Table:
    table = Table(title=paths.run_name)
    for column in ("stage", "state", "progress", "facts", "spent", "left"):
        table.add_column(column, overflow="fold")
    for state in states:
        progress = ""
        if state.total:
            share = (state.done or 0) / state.total
            progress = f"{state.done or 0:,} / {state.total:,} {state.unit} ({share:.0%})"
        facts = "  ".join(f"{key} {value}" for key, value in state.facts.items())
        table.add_row(
            cell(state.name),
            cell(state.state, _COLOURS.get(state.state, "")),
            cell(progress),
            cell(state.message or facts),
            _clock(state.spent_s),
            _clock(state.left_s),
        )
    return table


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
