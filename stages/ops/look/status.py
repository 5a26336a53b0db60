# SPDX-License-Identifier: Apache-2.0
"""How far is each stage of a run? A table, once or live, or JSON.

In: the folder of a run. Costs reading its status files and its manifests.
"""

import dataclasses
import datetime
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shared.artifacts.history import read_curves
from shared.artifacts.process_state import ENDED_BADLY, ProcessState
from shared.artifacts.run_state import RunState, find_run
from shared.errors import UserError
from shared.paths import STAGES, RunPaths
from shared.runtime.process import stop_requested
from shared.runtime.tables import cell
from stages.ops.chain.processes import is_done
from stages.ops.config import StatusConfig, WatchConfig

_COLOURS = {
    "done": "green",
    "running": "cyan",
    "died": "bold red",
    "failed": "bold red",
    "stopped": "yellow",
    "unreadable": "bold red",
}
# Errors of a command with other settings than those of the artifact, or of what it was made of.
_OTHER_SETTINGS = ("artifact-settings", "parent-settings")
_BARS, _MAX_BARS = "▁▂▃▄▅▆▇█", 40


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
            live.update(Group(_table(paths, states), *_curves(paths)), refresh=True)


def _looks(paths: RunPaths, period_s: float) -> Iterator[list[ProcessState]]:
    """The states, again and again, for as long as they can change by themselves."""
    while True:
        states = read_states(paths)
        yield states
        seen = {state.state for state in states} - {"skipped"}
        # After a bad end the chain goes on only when somebody starts it again.
        if seen == {"done"} or (seen.intersection(ENDED_BADLY) and "running" not in seen):
            return
        until = time.monotonic() + period_s
        while time.monotonic() < until:
            if stop_requested():
                return
            time.sleep(min(0.1, period_s))


def read_states(paths: RunPaths) -> list[ProcessState]:
    """Every stage's state, in order; a stage of several processes has one for each."""
    run = RunState(paths)
    return [
        _as_finished(process, stage, run) for stage in STAGES for process in run.processes(stage)
    ]


def _as_finished(process: ProcessState, stage: str, run: RunState) -> ProcessState:
    """A finished artifact that other settings were refused for since: it is as it was."""
    code = process.error["code"] if process.error else ""
    if process.state != "failed" or code not in _OTHER_SETTINGS or not is_done(stage, run.paths):
        return process
    try:
        seconds = run.seconds(stage)
    except UserError:  # validate reports what is wrong with it
        return process
    message = f"other settings were refused since: {process.message}"
    return dataclasses.replace(process, state="done", message=message, seconds=seconds)


def _print_json(paths: RunPaths, states: list[ProcessState]) -> None:
    record = {"run": paths.run_name, "stages": [state.as_dict() for state in states]}
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def _table(paths: RunPaths, states: list[ProcessState]) -> Table:
    table = Table(title=cell(paths.run_name))
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
            _clock(state.seconds),
            _clock(state.left_s),
        )
    return table


def _curves(paths: RunPaths) -> Iterator[Text]:
    """Loss and walked acceptance length over train's steps, a line each."""
    curves = read_curves(paths.stage("train") / "history.jsonl")
    for name, points in (("loss", curves["loss"]), ("walked AL", curves["walks"])):
        if len(points) > 1:
            (first, began), (last, now) = points[0], points[-1]
            bars = sparkline([value for _, value in points])
            span = f"step {first:.0f} to {last:.0f}"
            yield Text(f"{name:>10} {bars}  {began:.2f} to {now:.2f}, {span}")


def sparkline(values: Sequence[float]) -> str:
    """The values as bars between the lowest and the highest, at most 40.

    Worked example: 1, 2, 3, 8 become "▁▂▃█"; more values than bars are averaged in groups.
    """
    groups = min(len(values), _MAX_BARS)
    edges = [len(values) * group // groups for group in range(groups + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)


def _clock(seconds: float | None) -> str:
    try:
        return "" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))
    except (OverflowError, ValueError):  # infinite, or longer than any calendar
        return "?"
