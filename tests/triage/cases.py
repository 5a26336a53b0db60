# SPDX-License-Identifier: Apache-2.0
"""The logs that triage is tested on: recorded from real failures, reported by others, or quoted.

`fixtures/triage/{recorded,reported}/*.log`: YAML up to a line `---`, then the log. `quoted/*.yaml`:
lists of such cases with the log as a text. `expect` is the id that must come first; '' is nothing
wrong.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "triage"
END_OF_HEADER = "---\n"


@dataclasses.dataclass(frozen=True)
class FailureCase:
    """One log, what else the run's files say, and the diagnosis that it must get."""

    name: str
    kind: str  # recorded, reported or quoted
    expect: str
    source: str
    log: str
    stage: str | None = None
    benign: str = ""  # the rule that names a harmless line
    status: dict[str, Any] | None = None
    recipe: dict[str, Any] | None = None
    other_statuses: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    case: str = ""  # of the provoking script
    versions: dict[str, str] | None = None

    def lay_out(self, folder: Path, log: str | None = None) -> Path:
        """Write it as a run's folder (or a bare log, where no stage is known); returns its path."""
        text = self.log if log is None else log
        if self.stage is None:
            path = folder / "captured.log"
            path.write_text(text)
            return path
        run = folder / "run"
        (run / "logs").mkdir(parents=True, exist_ok=True)
        (run / "logs" / f"{self.stage}.log").write_text(text)
        own = {} if self.status is None else {self.stage: self.status}
        for stage, record in {**self.other_statuses, **own}.items():
            (run / "status").mkdir(exist_ok=True)
            whole = {"pid": 1, "host": "node", "started_s": 0, "updated_s": 0, **record}
            (run / "status" / f"{stage}.json").write_text(json.dumps(whole))
        if self.recipe is not None:
            (run / "recipe.yaml").write_text(yaml.safe_dump(self.recipe))
        return run


def _recorded(path: Path) -> FailureCase:
    header, _, log = path.read_text().partition(END_OF_HEADER)
    return FailureCase(name=path.stem, kind=path.parent.name, log=log, **yaml.safe_load(header))


def _quoted(path: Path) -> list[FailureCase]:
    entries = yaml.safe_load(path.read_text())
    names = [entry["expect"] or entry.get("benign", "clean") for entry in entries]
    return [
        FailureCase(name=f"quoted-{name}", kind="quoted", **entry)
        for name, entry in zip(names, entries, strict=True)
    ]


def read_cases() -> list[FailureCase]:
    """All of them, the recorded ones first."""
    found = [_recorded(path) for path in sorted(FIXTURES.glob("*/*.log"))]
    for path in sorted((FIXTURES / "quoted").glob("*.yaml")):
        found += _quoted(path)
    return found
