# SPDX-License-Identifier: Apache-2.0
"""A failed log as a test's fixture: its end, without this machine's paths and secrets.

In: what triage found. Out: one file, YAML up to a line `---`, then the log. Someone who meets a
failure that no rule knows saves it, adds a rule, and corrects `expect` to the rule's id.
"""

import dataclasses
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from shared.artifacts.provenance import package_versions
from shared.errors import UserError
from shared.io import files
from stages.ops.look.triage.diagnosis import Outcome
from stages.ops.look.triage.log_lines import clean
from stages.ops.look.triage.text import safe

LAST_LINES = 300
_BEGIN = re.compile(rb"\bINFO \w+ begin: process \d+\s*$")
_APP = Path(__file__).resolve().parents[4]


@dataclasses.dataclass(frozen=True)
class Places:
    """This machine's folders, and what a fixture calls them."""

    workspace: Path | None = None

    def hide(self, text: str) -> str:
        """`text` with every folder and host of this machine renamed."""
        known = {
            str(self.workspace.absolute()) if self.workspace else "": "/workspace",
            str(_APP): "/app",
            sys.prefix: "/venv",
            str(Path(sys.prefix).resolve()): "/venv",
            sys.base_prefix: "/usr/python",
            str(Path.home()): "/home/user",
            socket.gethostname(): "node",
        }
        for place in sorted((name for name in known if len(name) > 3), key=len, reverse=True):
            if known[place] not in ("/", ""):
                text = text.replace(place, known[place])
        return text


def last_attempt(path: Path) -> str:
    """The end of a log, from its last `begin:` on, at most `LAST_LINES` lines, made harmless."""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - (1 << 20)))
        lines = log.read().splitlines()
    starts = [number for number, line in enumerate(lines) if _BEGIN.search(line)]
    lines = lines[starts[-1] if starts else 0 :][-LAST_LINES:]
    return "".join(safe(clean(line.rsplit(b"\r")[-1])) + "\n" for line in lines)


def as_fixture(header: Mapping[str, Any], log: str, places: Places) -> str:
    """The fixture's text."""
    told = {key: value for key, value in header.items() if value not in (None, "", {})}
    told.setdefault("expect", "")
    return places.hide(yaml.safe_dump(told, sort_keys=False, width=1000) + "---\n" + log)


def save_fixture(outcome: Outcome, path: Path) -> None:
    """Write the log of the first diagnosis, or the only log, as a fixture.

    Raises:
        UserError: there is something at `path` already, or several logs and no diagnosis.
    """
    if path.exists():
        raise UserError(f"--save_fixture: {path} is there already; give a new name.")
    top = outcome.top
    logs = {log.path: log.stage for log, _ in outcome.findings}
    at = top.evidence.path if top and top.evidence else None
    if at not in logs:
        of_stage = [log for log, stage in logs.items() if not top or stage == top.stage]
        at = of_stage[0] if len(of_stage) == 1 else None
    if at is None:
        raise UserError("--save_fixture: expected one log to keep; give it by its path.")
    stage = logs[at]
    facts = outcome.case.stages.get(stage or "")
    header = {
        "expect": top.rule if top else "",
        "source": "recorded by triage --save_fixture",
        "stage": stage,
        "status": _status(facts.record) if facts else None,
        "versions": package_versions(),
    }
    text = as_fixture(header, last_attempt(at), Places(outcome.case.workspace))
    files.write_text(path, text)
    sys.stderr.write(f"kept {os.path.relpath(path)}; read it before you share it\n")


def _status(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: record[key] for key in ("state", "exit_code", "message") if key in record}
    return {**kept, "updated_s": 0} if kept.get("state") == "running" else kept
