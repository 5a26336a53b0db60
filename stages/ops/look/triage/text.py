# SPDX-License-Identifier: Apache-2.0
"""Diagnoses as a person and as a script read them.

A log's text comes from strangers: control characters are shown escaped, so that they cannot move a
terminal's cursor, and what looks like a secret is masked.
"""

import json
import re
from typing import Any

from shared.io.files import printable
from shared.paths import STAGES
from shared.runtime.wording import counted
from stages.ops.look.triage.diagnosis import UNKNOWN, Diagnosis, Outcome
from stages.ops.look.triage.last_attempt import read_last_attempt
from stages.ops.look.triage.log_lines import Line

_WIDTH = 300
_BEFORE, _AFTER = 8, 6
_MASK = "****"
_SECRETS = (
    re.compile(r"\b(?:hf|ghp|gho|glpat|xox[abp]|sk|nvapi)[_-][A-Za-z0-9_-]{8,}"),
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    re.compile(r"(?i)(?<=bearer )\S+"),
    re.compile(
        r"(?i)(?<![a-z0-9])(?:[a-z0-9]+[_-])*(?:api[_-]?key|token|secret|password|passwd)['\"]?\s*[=:]\s*['\"]?"
        r"(?P<value>(?=[^\s'\",;]*[a-z])(?=[^\s'\",;]*[0-9])[^\s'\",;]{8,})"
    ),
    re.compile(r"(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"),
)


def safe(text: str) -> str:
    """`text` without secrets, its control characters shown as such."""
    for secret in _SECRETS:
        text = secret.sub(_masked, text)
    return printable(text)


def _masked(found: "re.Match[str]") -> str:
    value = found.groupdict().get("value")
    return found[0].replace(value, _MASK) if value else _MASK


def shown(line: Line) -> str:
    """`path:number: text`, one line that fits on a screen or two."""
    text = safe(line.text.strip())
    return f"{safe(str(line.path))}:{line.number}: {text[:_WIDTH]}{'...' if len(text) > _WIDTH else ''}"


def context(line: Line) -> list[str]:
    """The lines around one, read again from its log."""
    if line.path.suffix == ".json":  # a status file
        return []
    lines = read_last_attempt(line.path).lines
    index = next((i for i, (number, _) in enumerate(lines) if number == line.number), 0)
    return [safe(text)[:_WIDTH] for _, text in lines[max(0, index - _BEFORE) : index + 1 + _AFTER]]


def as_text(outcome: Outcome) -> str:
    """The page for a terminal."""
    lines: list[str] = []
    for number, found in enumerate(outcome.diagnoses, 1):
        lines += _block(number, found)
    if not lines:
        logs = counted(len(outcome.findings), "log")
        count = sum(found.attempt.num_lines for _, found in outcome.findings)
        lines.append(f"nothing wrong found in {logs} of {counted(count, 'line')}")
    elif outcome.benign:
        lines.append("known and harmless, also there:")
        lines += [
            f"  {safe(cause)}" for cause in sorted({hit.rule.cause for hit in outcome.benign})
        ]
    return "\n".join(lines) + "\n"


def _block(number: int, found: Diagnosis) -> list[str]:
    note = " (a consequence)" if found.role == "consequence" else ""
    lines = [f"{number}. {safe(found.whose)}: {safe(found.cause)} [{found.rule}]{note}"]
    if found.evidence:
        lines.append(f"   evidence: {shown(found.evidence)}")
    if found.rule == UNKNOWN and found.evidence:
        lines += [f"   | {text}" for text in context(found.evidence)]
    if number > 1:
        return lines
    return [*lines, f"   fix:      {safe(found.fix)}", f"   re-run:   {safe(found.rerun)}", ""]


def as_json(outcome: Outcome) -> str:
    """The same for scripts."""
    states = {stage: outcome.case.state(stage) for stage in STAGES}
    record = {
        "schema_version": 2,
        "failed": bool(outcome.diagnoses),
        "stages": {
            stage: {"state": state.state, "exit_code": state.exit_code}
            for stage, state in states.items()
        },
        "diagnoses": [_record(found) for found in outcome.diagnoses],
        "benign": sorted({hit.rule.id for hit in outcome.benign}),
        "logs": [
            {
                "path": str(log.path),
                "lines": found.attempt.num_lines,
                "bytes": found.attempt.num_bytes,
            }
            for log, found in outcome.findings
        ],
    }
    return json.dumps(record, indent=2, ensure_ascii=True) + "\n"


def _record(found: Diagnosis) -> dict[str, Any]:
    evidence = found.evidence
    location: dict[str, Any] | None = None
    if evidence:
        text = safe(evidence.text.strip())
        location = {"file": str(evidence.path), "line": evidence.number, "text": text}
        if found.rule == UNKNOWN:
            location["context"] = context(evidence)
    return {
        "rule": found.rule,
        "role": found.role,
        "stage": found.stage,
        "cause": safe(found.cause),
        "fix": safe(found.fix),
        "rerun": found.rerun,
        "facts": dict(found.facts),
        "evidence": location,
    }
