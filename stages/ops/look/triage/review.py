# SPDX-License-Identifier: Apache-2.0
"""The pass/fail page over all logs of a run: a line for each stage, then what to do next.

In: what triage found. Out: Markdown. A stage of a run passes when its manifest or its status says
so. A launcher's logs say no such thing: there a task passes when its log has lines and no failure in
it, and the page says that this is all that is known.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io import files
from shared.paths import STAGES
from stages.ops.look.triage.diagnosis import Diagnosis, Outcome, rerun_command
from stages.ops.look.triage.matching import Findings
from stages.ops.look.triage.text import safe, shown

_VERDICTS = {"done": "PASS", "failed": "FAIL", "died": "FAIL"}


def as_markdown(outcome: Outcome) -> str:
    """The whole page."""
    case = outcome.case
    verdicts = {stage: _verdict(stage, outcome) for stage in STAGES}
    failed = [stage for stage in STAGES if verdicts[stage] == "FAIL"]
    lines = [f"# Review of {safe(str(case.root or 'logs'))}", ""]
    lines += [_summary(failed, verdicts, outcome.of(None)), ""]
    lines += ["| stage | verdict | what its files say | log |", "|---|---|---|---|"]
    lines += [_row(stage, verdicts[stage], outcome) for stage in STAGES]
    firsts = {each.stage: each for each in reversed(outcome.diagnoses)}
    for stage in (*STAGES, None):
        lines += ["", *_section(firsts[stage])] if stage in firsts else []
    lines += ["", "## Next", "", *_next(outcome, verdicts)]
    if case.kind != "run":
        lines += ["", "From the logs alone: a task whose log shows no failure counts as passed."]
    return "\n".join(lines) + "\n"


def _verdict(stage: str, outcome: Outcome) -> str:
    state = outcome.case.state(stage).state
    if state in _VERDICTS:
        return _VERDICTS[state]
    if outcome.of(stage):
        return "FAIL"
    if state in ("running", "stopped"):
        return state.upper()
    found = _findings(stage, outcome)
    has_lines = any(each.attempt.num_lines for each in found)
    if any(each.is_done for each in found) or (has_lines and outcome.case.kind != "run"):
        return "PASS"
    return "NOT RUN"


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
    attempts = [found.attempt for found in _findings(stage, outcome)]
    logs = ", ".join(f"{each.path.name} ({each.num_lines} lines)" for each in attempts) or "none"
    return f"| {stage} | {verdict} | {_cell(_facts(stage, outcome))} | {_cell(logs)} |"


def _cell(text: str) -> str:
    return safe(text).replace("|", "\\|")


def _facts(stage: str, outcome: Outcome) -> str:
    """One line: rows, time, exit code; and what went wrong."""
    state = outcome.case.state(stage)
    parts = [each.cause for each in outcome.of(stage)[:1]]
    parts += _manifest_facts(stage, outcome)
    if state.state != "done" and state.progress:
        parts.append("{done} of {total} {unit}".format(**{"unit": "", **state.progress}))
    if state.seconds is not None:
        parts.append(f"{state.seconds:.0f} s")
    if state.exit_code:
        parts.append(f"exit code {state.exit_code}")
    attempts = max((each.attempt.count for each in _findings(stage, outcome)), default=0)
    if attempts > 1:
        parts.append(f"attempt {attempts}")
    return "; ".join(parts)


def _manifest_facts(stage: str, outcome: Outcome) -> list[str]:
    run = outcome.case.run
    if run is None:
        return []
    facts = []
    try:
        if manifest := run.manifest(stage):
            counts = manifest["counts"]
            rejected = counts["in"] - counts["ok"]
            facts.append(f"{counts['ok']} of {counts['in']} rows, {rejected} rejected")
        if stage == "bench" and (length := _acceptance_length(run.paths.report)) is not None:
            facts.append(f"acceptance length {length:.2f}")
    except UserError:  # validate reports what is wrong with it
        return []
    return facts


def _acceptance_length(path: Path) -> float | None:
    report: Any = files.read_json(path) if path.exists() else None
    for key in ("head", "acceptance", "acceptance_length"):
        report = report.get(key) if isinstance(report, dict) else None
    return report if isinstance(report, float) else None


def _section(found: Diagnosis) -> list[str]:
    lines = [f"## {found.stage or 'A log of no known stage'}: {safe(found.cause)}", ""]
    if found.evidence:
        lines += [f"    {shown(found.evidence)}", ""]
    return [*lines, f"{safe(found.fix).rstrip('.')}."]


def _next(outcome: Outcome, verdicts: Mapping[str, str]) -> list[str]:
    if top := outcome.top:
        fix = safe(top.fix).rstrip(".")
        return [f"1. {fix}.", "2. Then:", "", f"       {safe(top.rerun)}"]
    left = [stage for stage, verdict in verdicts.items() if verdict not in ("PASS", "RUNNING")]
    if left:
        return [f"    {safe(rerun_command(outcome.case, left[0]))}"]
    running = [stage for stage, verdict in verdicts.items() if verdict == "RUNNING"]
    return [f"Wait for {', '.join(running)}." if running else "Nothing: the head is in export/."]
