# SPDX-License-Identifier: Apache-2.0
"""Diagnoses as a person and as a script read them.

What a log holds is a stranger's text: control characters are shown escaped, so that it cannot move
a terminal's cursor, and what looks like a secret is masked.
"""

import collections
import json
import re
from typing import Any

from stages.ops.look.triage.diagnosis import UNKNOWN, Diagnosis, Outcome
from stages.ops.look.triage.log_lines import Line, clean

_WIDTH = 300
_BEFORE, _AFTER = 6, 14
_CONTEXT_BYTES = 16_384
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
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )


def _masked(found: "re.Match[str]") -> str:
    value = found.groupdict().get("value")
    return found[0].replace(value, _MASK) if value else _MASK


def shown(line: Line) -> str:
    """`path:number: text`, one line that fits on a screen or two."""
    text = safe(line.text.strip())
    return f"{safe(str(line.path))}:{line.number}: {text[:_WIDTH]}{'...' if len(text) > _WIDTH else ''}"


def context(line: Line) -> list[str]:
    """The lines around one, read again from its file."""
    try:
        with line.path.open("rb") as log:
            start = max(0, line.offset - _CONTEXT_BYTES)
            log.seek(start)
            before = log.read(line.offset - start).splitlines()[-_BEFORE:]
            after = log.read(_CONTEXT_BYTES).splitlines()[: _AFTER + 1]
    except OSError:
        return []
    return [safe(clean(text))[:_WIDTH] for text in (*before, *after)]


def as_text(outcome: Outcome) -> str:
    """The page for a terminal."""
    lines: list[str] = []
    for number, found in enumerate(outcome.diagnoses, 1):
        lines += _block(number, found, is_first=number == 1)
    if not lines:
        lines.append("nothing wrong found in " + _what_was_read(outcome))
    harmless = collections.Counter(hit.rule.cause for hit in outcome.benign)
    if outcome.diagnoses and harmless:
        lines.append("known and harmless, also there:")
        lines += [f"  {safe(cause)}" for cause in harmless]
    return "\n".join(lines) + "\n"


def _what_was_read(outcome: Outcome) -> str:
    count = sum(found.num_lines for _, found in outcome.findings)
    return f"{len(outcome.findings)} logs of {count} lines"


def _block(number: int, found: Diagnosis, *, is_first: bool) -> list[str]:
    name = found.stage or "some stage"
    note = " (a consequence)" if found.role == "consequence" else ""
    lines = [f"{number}. {name}: {safe(found.cause)} [{found.rule}]{note}"]
    if found.evidence:
        lines.append(f"   evidence: {shown(found.evidence)}")
    if found.rule == UNKNOWN and found.evidence:
        lines += [f"   | {text}" for text in context(found.evidence)]
    if is_first:
        lines += [f"   fix:      {safe(found.fix)}", f"   re-run:   {safe(found.rerun)}"]
    return [*lines, ""] if is_first else lines


def as_json(outcome: Outcome) -> str:
    """The same for scripts."""
    record = {
        "schema_version": 1,
        "failed": bool(outcome.diagnoses),
        "stages": {
            stage: {"state": facts.state, "exit_code": facts.exit_code}
            for stage, facts in outcome.case.stages.items()
        },
        "diagnoses": [_record(found) for found in outcome.diagnoses],
        "benign": sorted({hit.rule.id for hit in outcome.benign}),
        "logs": [
            {"path": str(found.path), "lines": found.num_lines, "bytes": found.num_bytes}
            for _, found in outcome.findings
        ],
    }
    return json.dumps(record, indent=2, ensure_ascii=True) + "\n"


def _record(found: Diagnosis) -> dict[str, Any]:
    evidence = found.evidence
    place = None
    if evidence:
        place = {
            "file": str(evidence.path),
            "line": evidence.number,
            "text": safe(evidence.text.strip()),
        }
        if found.rule == UNKNOWN:
            place["context"] = context(evidence)
    return {
        "rule": found.rule,
        "role": found.role,
        "stage": found.stage,
        "cause": safe(found.cause),
        "fix": safe(found.fix),
        "rerun": found.rerun,
        "evidence": place,
    }
