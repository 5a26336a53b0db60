# SPDX-License-Identifier: Apache-2.0
"""One fault: a stage that is disturbed at a drawn moment, then run again until it is done.

Recovery is what an operator would do: the same command, a few times where it says "try again", and
beyond that only what the stage's own message asks for.
"""

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.errors import EXIT_DONE, EXIT_RETRY, EXIT_USER
from tests.faults import judge, processes
from tests.faults.activity import Activity
from tests.faults.bed import RANKS, Bed, Reference, World

_RUNS = 4
_SEEN = 0.75
# A log record: its first line and the indented ones that belong to it.
_RECORD = re.compile(r"^.* ERROR .*(?:\n {4}.*)*", re.MULTILINE)
_DELETE = re.compile(r"[Dd]elete (?:the folder )?(/[^\s,:]+[^\s,:.])")
_DELETE_IT = re.compile(r"(/[^\s:]+[^\s:.]):? .*\bdelete it\b", re.IGNORECASE)


def errors_in(said: str) -> list[str]:
    """What a stage gave as the reasons of its end, each with its remedy and facts in one line."""
    return [" ".join(record.split()) for record in _RECORD.findall(said)]


class Case:
    """A world, the stage that is disturbed in it, and what was seen.

    Attributes:
        flags: of every run; one tuple a process, where several share the work.
        obeys: whether messages that ask for something are obeyed.
        came_late: the stage had ended before the drawn moment: nothing was disturbed.
    """

    def __init__(
        self,
        bed: Bed,
        stage: str,
        chance: random.Random,
        *,
        ranks: bool = False,
        world: World | None = None,
    ) -> None:
        self.bed, self.stage, self.chance = bed, stage, chance
        self.reference: Reference = bed.reference(stage, ranks=ranks)
        self.world: World = world or bed.world(stage)
        self.more = RANKS if ranks else {}
        self.flags: Sequence[tuple[str, ...]] = [()]
        self.obeys = False
        self.came_late = False
        self.detail = ""
        self.codes: list[int] = []
        self.problems: list[str] = []

    def start(self, before: Callable[[], None] | None = None) -> processes.Stage:
        return processes.Stage(
            self.world.path, self.stage, *self.flags[0], more=self.more, before=before
        )

    def wait_for_a_moment(self, process: processes.Stage) -> None:
        """Return after a drawn number of changes in the stage's folders, and some milliseconds.

        On a busy machine fewer changes are seen than there were when the stage was alone.
        """
        after = self.chance.randint(1, max(1, round(_SEEN * self.reference.changes)))
        self.detail = f"after change {after} of {self.reference.changes}"
        activity = Activity(self.world.folders(self.stage))
        self.came_late = not activity.watch(process.has_ended, until=after)
        time.sleep(self.chance.uniform(0, 0.01))

    def ended(self, process: processes.Stage, *allowed: int, alone: bool = True) -> int:
        """Wait for the disturbed stage; its code must be one of these.

        Args:
            alone: whether no other process may be at work there.
        """
        code, said = process.wait(), process.said()
        self.codes.append(code)
        if code not in allowed:
            told = (errors_in(said) or said.splitlines() or [""])[-1]
            self.problems.append(f"exit {code}, expected one of {allowed}: {told[:300]}")
        if code == EXIT_USER and str(self.world.path) not in "".join(errors_in(said)):
            self.problems.append(f"exit 2 names no file: {errors_in(said)[-1:]}")
        if alone:
            left = processes.left_behind(self.world.path)
            self.problems += [f"a process outlived the stage: {words}" for words in left]
        return code

    def recover(self, *extra: str) -> None:
        """Run again until all is done, with `extra` flags first; then look at what is there."""
        waiting = [(flags, 0) for flags in self.flags]
        while waiting:
            flags, runs = waiting.pop(0)
            code, said = processes.run(self.world.path, self.stage, *flags, *extra, more=self.more)
            self.codes.append(code)
            extra = ()
            if code == EXIT_DONE:
                continue
            told = (errors_in(said) or [""])[-1]
            asked = self.obey(told) if code == EXIT_USER and self.obeys else None
            if code != EXIT_RETRY and asked is None:
                self.problems.append(f"run again, exit {code}: {told[:400]}")
                break
            if runs + 1 == _RUNS:
                self.problems.append(f"not done after {_RUNS} more runs: {told[:300]}")
                break
            extra = asked or ()
            waiting.append((flags, runs + 1))
        self.look()

    def look(self) -> None:
        """Hold what is there to the undisturbed run."""
        self.problems += judge.differences(self.stage, self.world, self.reference)
        self.problems += judge.untidy(self.world)
        if len(self.flags) == 1 and judge.status_of(self.stage, self.world) != "done":
            self.problems.append(f"its status is {judge.status_of(self.stage, self.world)!r}")
        left = processes.left_behind(self.world.path)
        self.problems += [f"a process outlived the stage: {words}" for words in left]

    def obey(self, told: str) -> tuple[str, ...] | None:
        """Do what the message asks for; more flags for the next run, or None where it asks nothing."""
        if named := _DELETE.search(told) or _DELETE_IT.search(told):
            path = Path(named[1])
            if self.world.path in path.parents and path.is_dir():
                shutil.rmtree(path)
                return ()
            if self.world.path in path.parents and path.is_file():
                path.unlink()
                return ()
        return ("--overwrite",) if "--overwrite" in told else None


def kill_engine(case: Case, process: processes.Stage, word: str) -> bool:
    """kill -9 one of the stage's own children; whether there was one."""
    deadline = time.monotonic() + 30
    while not process.has_ended() and time.monotonic() < deadline:
        if found := processes.children(process.pid, word):
            try:
                os.kill(case.chance.choice(found), signal.SIGKILL)
            except ProcessLookupError:
                continue
            return True
        time.sleep(0.01)
    return False
