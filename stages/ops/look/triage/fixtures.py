# SPDX-License-Identifier: Apache-2.0
"""A failed log as a test's fixture: its end, without this machine's paths and secrets.

In: what triage found. Out: one file, YAML up to a line `---`, then the log. Someone who meets a
failure that no rule knows saves it, adds a rule, and corrects `expect` to the rule's id.
"""

import os
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
from stages.ops.look.triage.last_attempt import read_last_attempt
from stages.ops.look.triage.text import safe

LAST_LINES = 300
_APP = Path(__file__).resolve().parents[4]


def without_machine(text: str, workspace: Path | None) -> str:
    """`text` with every folder and host of this machine renamed."""
    known = {
        str(workspace.absolute()) if workspace else "": "/workspace",
        str(_APP): "/app",
        sys.prefix: "/venv",
        str(Path(sys.prefix).resolve()): "/venv",
        sys.base_prefix: "/usr/python",
        str(Path.home()): "/home/user",
        socket.gethostname(): "node",
    }
    for name in sorted((name for name in known if len(name) > 3), key=len, reverse=True):
        text = text.replace(name, known[name])
    return text


def last_lines(path: Path) -> str:
    """The end of a log's last attempt, made harmless."""
    lines = read_last_attempt(path).lines[-LAST_LINES:]
    return "".join(safe(text) + "\n" for _, text in lines)


def as_fixture(header: Mapping[str, Any], log: str, workspace: Path | None) -> str:
    """The fixture's text."""
    kept = {key: value for key, value in header.items() if value not in (None, "", {})}
    kept.setdefault("expect", "")
    text = yaml.safe_dump(kept, sort_keys=False, width=1000) + "---\n" + log
    return without_machine(text, workspace)


def save_fixture(outcome: Outcome, path: Path) -> None:
    """Write the log of the first diagnosis, or the only log, as a fixture.

    Raises:
        UserError: there is something at `path` already, or several logs and no diagnosis.
    """
    if path.exists():
        raise UserError(
            f"--save_fixture: {path} exists already.",
            code="fixture-exists",
            remedy="Give a new name.",
        )
    top = outcome.top
    logs = {log.path: log.stage for log, _ in outcome.findings}
    at = top.evidence.path if top and top.evidence else None
    if at not in logs:
        of_stage = [log for log, stage in logs.items() if not top or stage == top.stage]
        at = of_stage[0] if len(of_stage) == 1 else None
    if at is None:
        raise UserError(
            "--save_fixture: expected one log to keep, found several.",
            code="fixture-log-unclear",
            remedy="Give the log by its path.",
        )
    stage = logs[at]
    header = {
        "expect": top.rule if top else "",
        "source": "recorded by triage --save_fixture",
        "stage": stage,
        "status": kept_status(outcome.case.state(stage).record) if outcome.case.run else None,
        "versions": package_versions(),
    }
    run = outcome.case.run
    files.write_text(path, as_fixture(header, last_lines(at), run.paths.workspace if run else None))
    sys.stderr.write(f"kept {os.path.relpath(path)}; read it before you share it\n")


def kept_status(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a fixture keeps of a status file."""
    names = ("state", "exit_code", "message", "error")
    return {name: record[name] for name in names if name in record}
