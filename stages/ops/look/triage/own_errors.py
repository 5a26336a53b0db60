# SPDX-License-Identifier: Apache-2.0
"""The errors of our own stages, by their parts: from a status file, or from a log's record.

    2026-11-20T03:12:44Z ERROR dump [target-layers] /models/x: expected 36 layers, found 32.
        remedy: Set run.target to the model that the recipe was made for.
        facts: {"expected": 36, "found": 32}

Nothing here knows what the words mean.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stages.ops.look.triage.log_lines import Line

# These report that an engine or a server failed; why is in the log above them.
WRAPPERS = frozenset({"engine-died", "engine-process-failed", "engine-start-refused"})
# These are somebody else's exception in our words: what a rule knows of it goes before them.
TRANSLATED = frozenset({"bug", "out-of-memory", "engine-out-of-memory"})
_RECORD = re.compile(r"\[(?P<code>[a-z0-9-]*)\] (?P<problem>.*)")
_PART = re.compile(r"(?:^|\s)(?P<name>remedy|facts): (?P<text>.*)")
# Records of several processes may lie between an error's lines.
_MAX_LINES = 12


@dataclasses.dataclass(frozen=True)
class OwnError:
    """An error that a stage of ours ended with."""

    code: str
    problem: str
    remedy: str
    facts: Mapping[str, Any]
    evidence: Line

    @classmethod
    def from_status(cls, error: Mapping[str, Any], evidence: Line) -> "OwnError":
        facts = error.get("facts") or {}
        return cls(error["code"], error["problem"], error.get("remedy", ""), facts, evidence)


def find_own_error(lines: Sequence[Line], stage: str | None) -> OwnError | None:
    """The last error record of `stage` (of any, where it is None) in a log."""
    for index in range(len(lines) - 1, -1, -1):
        line = lines[index]
        if not (record := _RECORD.match(line.body)) or (stage and line.stage not in (stage, None)):
            continue
        parts = _parts_after(lines, index)
        # Where a launcher cut time and level off, only the parts below show what it is.
        if line.kind == "ours" or (line.stage is None and record["code"] and "remedy" in parts):
            return OwnError(
                record["code"].lower(),
                record["problem"],
                parts.get("remedy", ""),
                _facts(parts.get("facts", "")),
                line,
            )
    return None


def _parts_after(lines: Sequence[Line], index: int) -> dict[str, str]:
    parts: dict[str, str] = {}
    for line in lines[index + 1 : index + 1 + _MAX_LINES]:
        if line.stage is not None and line.kind == "ours":
            break
        if part := _PART.search(line.body):
            parts.setdefault(part["name"], part["text"].strip())
    return parts


def _facts(text: str) -> Mapping[str, Any]:
    try:
        facts = json.loads(text) if text else {}
    except ValueError:  # cut by a terminal or a collector
        return {}
    return facts if isinstance(facts, dict) else {}
