# SPDX-License-Identifier: Apache-2.0
"""The pass/fail page over all logs of a run: a line a stage, then what to do next.

In: what triage found. Out: Markdown. A stage of a run passes when its manifest or its status says
so. A launcher's logs say no such thing: there a task passes when its log has lines and no failure in
it, and the page says that this is all that is known.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.artifacts.manifest import MANIFEST
from shared.errors import UserError
from shared.io import files
from shared.paths import STAGES
from stages.ops.look.triage.diagnosis import Diagnosis, Outcome, rerun_command
from stages.ops.look.triage.log_files import StageFacts
from stages.ops.look.triage.log_scan import Findings
from stages.ops.look.triage.text import safe, shown

_VERDICTS = {"done": "PASS", "failed": "FAIL", "vanished": "FAIL"}


def as_markdown(outcome: Outcome) -> str:
    """The whole page."""
    case = outcome.case
    verdicts = {stage: _verdict(stage, outcome) for stage in STAGES}
    failed = [stage for stage in STAGES if verdicts[stage] == "FAIL"]
    loose = outcome.of(None)
    lines = [f"# Review of {safe(str(case.root or 'logs'))}", ""]
    lines += [_summary(failed, verdicts, loose), ""]
    lines += ["| stage | verdict | what its files say | log |", "|---|---|---|---|"]
    lines += [_row(stage, verdicts[stage], outcome) for stage in STAGES]
    for found in _first_of_each_stage(outcome):
        lines += ["", *_section(found)]
    lines += ["", "## Next", "", *_next(outcome, verdicts)]
    if case.kind != "run":
        lines += [
            "",
            "Told from the logs alone: a task without a failure in its log counts as passed.",
        ]
    return "\n".join(lines) + "\n"


def _verdict(stage: str, outcome: Outcome) -> str:
    facts = outcome.case.stages.get(stage, StageFacts())
    if facts.state in _VERDICTS:
        return _VERDICTS[facts.state]
    if outcome.of(stage):
        return "FAIL"
    if facts.state in ("running", "stopped"):
        return facts.state.upper()
    found = _findings(stage, outcome)
    if any(each.is_done.get(stage) for each in found):
        return "PASS"
    has_lines = any(each.num_lines for each in found)
    return "PASS" if has_lines and outcome.case.kind != "run" else "NOT RUN"


def _findings(stage: str, outcome: Outcome) -> list[Findings]:
    return [found for log, found in outcome.findings if log.stage == stage]


def _summary(failed: list[str], verdicts: Mapping[str, str], loose: list[Diagnosis]) -> str:
    if failed or loose:
        return f"**FAIL**: {', '.join(failed) or 'a log of no known stage'}."
    if all(verdict == "PASS" for verdict in verdicts.values()):
        return "**PASS**: all four stages."
    left = [stage for stage, verdict in verdicts.items() if verdict != "PASS"]
    return f"**NOT FINISHED**: {', '.join(left)}."


def _row(stage: str, verdict: str, outcome: Outcome) -> str:
    found = _findings(stage, outcome)
    logs = ", ".join(f"{each.path.name} ({each.num_lines} lines)" for each in found) or "none"
    return f"| {stage} | {verdict} | {_cell(_told(stage, outcome))} | {_cell(logs)} |"


def _cell(text: str) -> str:
    return safe(text).replace("|", "\\|")


def _told(stage: str, outcome: Outcome) -> str:
    """One line: rows, time, exit code; and what went wrong."""
    facts = outcome.case.stages.get(stage, StageFacts())
    parts = []
    diagnoses = outcome.of(stage)
    if diagnoses:
        parts.append(diagnoses[0].cause)
    parts += _manifest_facts(stage, outcome.case.root) if outcome.case.kind == "run" else []
    progress = facts.record.get("progress")
    if facts.state != "done" and isinstance(progress, dict):
        parts.append(f"{progress.get('done')} of {progress.get('total')} {progress.get('unit')}")
    if isinstance(spent_s := _seconds(facts.record), float):
        parts.append(f"{spent_s:.0f} s")
    if facts.exit_code:
        parts.append(f"exit code {facts.exit_code}")
    attempts = max((each.attempts for each in _findings(stage, outcome)), default=0)
    if attempts > 1:
        parts.append(f"attempt {attempts}")
    return "; ".join(parts)


def _seconds(record: Mapping[str, Any]) -> float | None:
    started_s, updated_s = record.get("started_s"), record.get("updated_s")
    if not isinstance(started_s, int | float) or not isinstance(updated_s, int | float):
        return None
    end_s = time.time() if record.get("state") == "running" else updated_s
    return float(end_s - started_s)


def _manifest_facts(stage: str, root: Path | None) -> list[str]:
    if root is None:
        return []
    try:
        manifest = files.read_json(root / stage / MANIFEST)
        report = files.read_json(root / stage / "report.json") if stage == "bench" else None
    except UserError:
        return []
    told = []
    counts = manifest.get("counts") if isinstance(manifest, dict) else None
    if isinstance(counts, dict) and "in" in counts:
        rejected = sum(
            sum(counts.get(kind, {}).values())
            for kind in ("skipped", "failed")
            if isinstance(counts.get(kind), dict)
        )
        told.append(f"{counts.get('ok')} of {counts['in']} rows, {rejected} rejected")
    if isinstance(report, dict):
        length = report.get("head", {}).get("acceptance", {}).get("acceptance_length")
        told += [f"acceptance length {length:.2f}"] if isinstance(length, int | float) else []
    return told


def _first_of_each_stage(outcome: Outcome) -> list[Diagnosis]:
    firsts: dict[str | None, Diagnosis] = {}
    for found in outcome.diagnoses:
        firsts.setdefault(found.stage, found)
    return list(firsts.values())


def _section(found: Diagnosis) -> list[str]:
    lines = [f"## {found.stage or 'A log of no known stage'}: {safe(found.cause)}", ""]
    if found.evidence:
        lines += [f"    {shown(found.evidence)}", ""]
    return [*lines, f"{safe(found.fix)}."]


def _next(outcome: Outcome, verdicts: Mapping[str, str]) -> list[str]:
    top = outcome.top
    if top:
        return [f"1. {safe(top.fix)}.", "2. Then:", "", f"       {safe(top.rerun)}"]
    left = [stage for stage, verdict in verdicts.items() if verdict not in ("PASS", "RUNNING")]
    if not left:
        running = [stage for stage, verdict in verdicts.items() if verdict == "RUNNING"]
        return [
            f"Wait for {', '.join(running)}." if running else "Nothing: the head is in export/."
        ]
    return [f"    {safe(rerun_command(outcome.case, left[0]))}"]
