# SPDX-License-Identifier: Apache-2.0
"""What a validation found: one line a question, and the ways to show them.

A question is a function that returns what it saw, or raises `Wrong` with what is wrong,
`Skipped` where it cannot be answered here, or `Unknown` where nothing answers it. Whatever a damaged
file makes it trip over counts against the file: a validation fails closed and goes on to the next
question.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.errors import EyrieError
from shared.io.files import printable
from shared.runtime.tables import cell
from shared.runtime.wording import counted

PASS, FAIL, SKIP, UNKNOWN = "PASS", "FAIL", "SKIP", "UNKNOWN"
_COLOURS = {PASS: "green", FAIL: "bold red", SKIP: "yellow", UNKNOWN: "yellow"}
# Fewer losses than this tell nothing about a trend.
_LOSSES_FOR_A_TREND = 4
# What reading a damaged or a foreign file ends in, when its reader has no better word for it.
_DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError, OSError, ArithmeticError)


class Wrong(Exception):
    """What was found is not what it should be; the message says both, and where."""


class Skipped(Exception):
    """The question cannot be answered here; the message says why."""


class Unknown(Exception):
    """What there is to read does not say; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """The answer to one question about one artifact."""

    artifact: str
    question: str
    verdict: str
    detail: str


class Findings:
    """All answers of one validation, in the order of the questions."""

    def __init__(self) -> None:
        self.rows: list[Finding] = []

    def ask(self, artifact: str, question: str, answer: Callable[[], str]) -> bool:
        """Ask, keep what came out, and tell whether the next questions make sense."""
        try:
            verdict, detail = PASS, answer()
        except Skipped as reason:
            verdict, detail = SKIP, str(reason)
        except Unknown as reason:
            verdict, detail = UNKNOWN, str(reason)
        except (Wrong, EyrieError) as error:
            verdict, detail = FAIL, str(error)
        except _DAMAGE as error:
            verdict, detail = FAIL, f"could not be read: {type(error).__name__}: {error}"
        self.rows.append(Finding(artifact, question, verdict, printable(" ".join(detail.split()))))
        return verdict != FAIL

    def count(self, verdict: str) -> int:
        return sum(row.verdict == verdict for row in self.rows)

    @property
    def verdict(self) -> str:
        return next((worst for worst in (FAIL, UNKNOWN) if self.count(worst)), PASS)

    def summary(self) -> str:
        parts = [f"{self.count(PASS)} passed", f"{self.count(FAIL)} failed"]
        if self.count(SKIP):
            parts.append(f"{self.count(SKIP)} skipped")
        if self.count(UNKNOWN):
            parts.append(f"{self.count(UNKNOWN)} unknown")
        return f"{self.verdict}: {', '.join(parts)}"

    def as_json(self, run: str) -> dict[str, Any]:
        return {
            "run": run,
            "verdict": self.verdict,
            "passed": self.count(PASS),
            "failed": self.count(FAIL),
            "skipped": self.count(SKIP),
            "unknown": self.count(UNKNOWN),
            "findings": [dataclasses.asdict(row) for row in self.rows],
        }

    def as_markdown(self, run: str) -> str:
        lines = [f"# Validation of {run}", "", self.summary(), ""]
        lines += ["| artifact | question | verdict | detail |", "|---|---|---|---|"]
        for row in self.rows:
            detail = row.detail.replace("|", "\\|")
            lines.append(f"| {row.artifact} | {row.question} | {row.verdict} | {detail} |")
        return "\n".join(lines) + "\n"

    def show(self, run: str, console: Console) -> None:
        table = Table(title=cell(f"{run}: validation"))
        for name in ("artifact", "question", "verdict", "detail"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            verdict = Text(row.verdict, style=_COLOURS[row.verdict])
            table.add_row(row.artifact, row.question, verdict, cell(row.detail))
        console.print(table)
        console.print(Text(self.summary()))


@contextlib.contextmanager
def needs(module: str) -> Any:
    """Turn the lack of a package into `Skipped`: the ops image carries no torch."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise Skipped(
            f"{module} is not installed here; validate where train's packages are"
        ) from error


def ask_falling(losses: Sequence[float]) -> str:
    """The last quarter of a training's losses is below the first.

    Raises:
        Wrong: it is not.
        Skipped: they are too few to judge.
    """
    if len(losses) < _LOSSES_FOR_A_TREND:
        raise Skipped(f"{counted(len(losses), 'record')}: too few to tell whether the loss falls")
    part = max(1, len(losses) // 4)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    if last >= first:
        raise Wrong(
            f"the loss does not fall: {first:.4f} in the first quarter of the records, {last:.4f} in "
            "the last. Look at the learning rate and at the states."
        )
    return f"{first:.4f} in the first quarter, {last:.4f} in the last"
