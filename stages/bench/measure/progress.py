# SPDX-License-Identifier: Apache-2.0
"""How far the whole measurement is, in conversations that an engine has answered under a load."""

from pathlib import Path

from shared.runtime.log import Every
from shared.runtime.status import Status
from stages.bench.measure.plans import Plan

PERIOD_S = 10.0


class Progress:
    """Told as an engine begins, and every `PERIOD_S` while it answers.

    Args:
        path: of the status file.
        num_engines: how many play the plan, one after another.
    """

    def __init__(self, path: Path, plan: Plan, num_engines: int) -> None:
        self._status = Status(path, period_s=0.0)
        self._due = Every(PERIOD_S)
        self._loads = len(plan.loads)
        self._done, self._total = 0, num_engines * self._loads * len(plan.conversations)
        self._engine = ""

    def begins(self, engine: str) -> None:
        """The next engine is started."""
        self._engine = engine
        self._tell()

    def answered(self) -> None:
        """One more conversation is answered."""
        self._done += 1
        if self._due() or self._done == self._total:
            self._tell()

    def _tell(self) -> None:
        facts = {"measuring": self._engine, "loads": self._loads}
        self._status.progress(self._done, self._total, "prompts", **facts)
