# SPDX-License-Identifier: Apache-2.0
"""The pass/fail page over all logs of a run: a line for each stage, then what to do next.

In: what triage found. Out: Markdown. A stage of a run passes when its manifest or its status says
so. A launcher's logs say no such thing: there a task passes when its log has lines and no failure in
it, and the page says that this is all that is known.
"""

from pathlib import Path
from typing import Any

import jinja2

from shared.errors import UserError
from shared.io import files
from shared.paths import STAGES
from shared.runtime.wording import counted
from stages.ops.look.triage.diagnosis import Outcome, rerun_command
from stages.ops.look.triage.matching import Findings
from stages.ops.look.triage.text import safe, shown

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
# A log's words come from strangers.
_TEMPLATES.filters |= {
    "safe": safe,
    "cell": lambda text: safe(text).replace("|", "\\|"),
    "shown": shown,
}
_VERDICTS = {"done": "PASS", "failed": "FAIL", "died": "FAIL", "skipped": "SKIPPED"}
_FINISHED = ("PASS", "SKIPPED")


def as_markdown(outcome: Outcome) -> str:
    """The whole page."""
    verdicts = {stage: _verdict(stage, outcome) for stage in STAGES}
    failed = [stage for stage in STAGES if verdicts[stage] == "FAIL"]
    left = [stage for stage in STAGES if verdicts[stage] not in (*_FINISHED, "RUNNING")]
    firsts = {found.stage: found for found in reversed(outcome.diagnoses)}
    return _TEMPLATES.get_template("review.md.j2").render(
        root=outcome.case.root or "logs",
        is_run=outcome.case.kind == "run",
        verdicts=verdicts,
        failed=failed or [each.whose for each in outcome.of(None)[:1]],
        unfinished=[stage for stage in STAGES if verdicts[stage] not in _FINISHED],
        rows=[(stage, verdicts[stage], *_row(stage, outcome)) for stage in STAGES],
        sections=[firsts[stage] for stage in (*STAGES, None) if stage in firsts],
        top=outcome.top,
        rerun=rerun_command(outcome.case, left[0]) if left else "",
    )


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


def _row(stage: str, outcome: Outcome) -> tuple[str, str]:
    """(what the stage's files say, its logs)."""
    attempts = [found.attempt for found in _findings(stage, outcome)]
    logs = (
        ", ".join(f"{each.path.name} ({counted(each.num_lines, 'line')})" for each in attempts)
        or "none"
    )
    return _facts(stage, outcome), logs


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
