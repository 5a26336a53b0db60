# SPDX-License-Identifier: Apache-2.0
"""From what the logs hold to what went wrong: the ranked diagnoses of a case.

The first stage of the chain that failed comes first: those after it fail for want of its output. In a
stage its own error comes first. Where that only reports that something else failed (an engine, a
server, a bug), what the rules know of the log goes before it: the earliest cause, for a worker's
first error precedes its engine's "see above". An error that no rule knows is shown and not guessed at.
"""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.artifacts.process_state import ProcessState
from shared.errors import EXIT_BUG, EXIT_RETRY
from shared.paths import STAGES
from stages.ops.look.triage.case import Case, LogFile
from stages.ops.look.triage.failure_rules import Rule
from stages.ops.look.triage.last_attempt import read_last_attempt
from stages.ops.look.triage.log_lines import Line
from stages.ops.look.triage.matching import Findings, Hit, find
from stages.ops.look.triage.own_errors import TRANSLATED, WRAPPERS, OwnError
from stages.ops.look.triage.wording import render

UNKNOWN, OWN = "unknown", "own"
_TIERS = {"cause": 1, "generic": 2, UNKNOWN: 4, "consequence": 5}
_OWN_TIER, _OWN_OPEN_TIER, _OWN_WRAPPER_TIER = 0, 3, 5
_FAILED = ("failed", "died", "unreadable")
_CURVE = "curve"  # the command of train that has a log of its own


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """One answer to "what went wrong", with its evidence.

    Attributes:
        rule: a rule's id, the code of an error of ours, or `unknown`.
        role: the rule's role, `own` or `unknown`.
        facts: of an error of ours.
    """

    rule: str
    role: str
    stage: str | None
    cause: str
    fix: str
    rerun: str
    evidence: Line | None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def whose(self) -> str:
        """The stage, or the log of no stage that it is about."""
        log = f"{self.evidence.path.name}, " if self.evidence else ""
        return self.stage or f"{log}a log of no known stage"


@dataclasses.dataclass
class Outcome:
    """What triage has to say about a case."""

    case: Case
    findings: list[tuple[LogFile, Findings]]
    diagnoses: list[Diagnosis]

    @property
    def top(self) -> Diagnosis | None:
        return self.diagnoses[0] if self.diagnoses else None

    @property
    def benign(self) -> list[Hit]:
        return [hit for _, found in self.findings for hit in found.benign]

    def of(self, stage: str | None) -> list[Diagnosis]:
        return [found for found in self.diagnoses if found.stage == stage]


Ranked = tuple[int, int, Diagnosis]


def diagnose(case: Case, rules: Sequence[Rule]) -> Outcome:
    """Read all logs of the case and rank what they hold."""
    findings = []
    for log in case.logs:
        attempt = read_last_attempt(log.path)
        stage = log.stage or attempt.stage
        findings.append((LogFile(log.path, stage), find(attempt, rules, stage)))
    diagnoses: dict[tuple[str, str | None], Diagnosis] = {}
    for stage in (*STAGES, None):
        own = [found for log, found in findings if log.stage == stage]
        for _, _, each in sorted(_of_stage(stage, case, own, rules), key=lambda ranked: ranked[:2]):
            diagnoses.setdefault((each.rule, each.stage), each)
    return Outcome(case, findings, list(diagnoses.values()))


def _of_stage(
    stage: str | None, case: Case, findings: Sequence[Findings], rules: Sequence[Rule]
) -> list[Ranked]:
    state = case.state(stage)
    if state.state in ("done", "stopped"):
        return []
    failed = state.state in _FAILED
    open_findings = [found for found in findings if failed or not (found.is_done or found.went_on)]
    ranked = [_of_hit(hit, stage, case) for found in open_findings for hit in found.hits]
    if own := _own_error(state, open_findings):
        ranked.append((_own_tier(own, state), own.evidence.number, _of_own(own, stage, case)))
    ranked += _without_lines(stage, state, case, findings, rules)
    return ranked + _unknown(stage, state, case, open_findings, ranked)


def _own_error(state: ProcessState, findings: Sequence[Findings]) -> OwnError | None:
    """From the status file; from a log's last record where there is none."""
    if state.error and state.path:
        return OwnError.from_status(state.error, _own_line(state, state.path, findings))
    if state.state == "unreadable" and state.path:
        line = Line(state.path, 1, state.message)
        return OwnError("status-unreadable", state.message, "Delete it.", {}, line)
    return next((found.own for found in findings if found.own), None)


def _own_line(state: ProcessState, status: Path, findings: Sequence[Findings]) -> Line:
    """The log's record of the same error, else the status file."""
    for found in findings:
        if found.own and state.error and found.own.code == state.error["code"]:
            return found.own.evidence
    return Line(status, 1, state.message)


def _own_tier(own: OwnError, state: ProcessState) -> int:
    if own.code in WRAPPERS:
        return _OWN_WRAPPER_TIER
    is_open = own.code in TRANSLATED or state.exit_code in (EXIT_BUG, EXIT_RETRY)
    return _OWN_OPEN_TIER if is_open else _OWN_TIER


def _of_own(own: OwnError, stage: str | None, case: Case) -> Diagnosis:
    stage = stage or _guessed(own.evidence.stage, case)
    return Diagnosis(
        rule=own.code or "no-code",
        role=OWN,
        stage=stage,
        cause=own.problem,
        fix=own.remedy or "see the problem",
        rerun=rerun_command(case, _first_of(stage, own.facts.get("stage")), own.evidence.path),
        evidence=own.evidence,
        facts=own.facts,
    )


def _guessed(stage: str | None, case: Case) -> str | None:
    """The stage that a log of no stage's name speaks of.

    In a run it stays nobody's: each stage has a log by its name there, and another command of a stage,
    such as `curve`, has not made what the stage has.
    """
    return stage if case.run is None and stage in STAGES else None


def _first_of(stage: str | None, named: object) -> str | None:
    """The stage that failed, or the one before it that its error names."""
    if stage in STAGES and named in STAGES:
        return min(stage, str(named), key=STAGES.index)
    return stage


def _of_hit(hit: Hit, stage: str | None, case: Case) -> Ranked:
    rule, whose = hit.rule, stage or _guessed(hit.rule.belongs_to, case)
    diagnosis = Diagnosis(
        rule=rule.id,
        role=rule.role,
        stage=whose,
        cause=render(rule.cause, case, whose, hit.seen),
        fix=render(rule.fix, case, whose, hit.seen),
        rerun=rerun_command(case, rule.redo or whose, hit.line.path),
        evidence=hit.line,
    )
    return _TIERS[rule.role], hit.line.number, diagnosis


def _without_lines(
    stage: str | None,
    state: ProcessState,
    case: Case,
    findings: Sequence[Findings],
    rules: Sequence[Rule],
) -> list[Ranked]:
    """The rules that only look at what a stage is, with the last line of its log as evidence."""
    last = next((found.last for found in findings if found.last), None)
    line = last or (Line(state.path, 1, state.message) if state.path else None)
    holding = [
        rule
        for rule in rules
        if rule.when
        and line
        and (not rule.when.exit_codes or state.exit_code in rule.when.exit_codes)
        and (not rule.when.states or state.state in rule.when.states)
    ]
    return [_of_hit(Hit(rule, line, {}), stage, case) for rule in holding if line]


def _unknown(
    stage: str | None,
    state: ProcessState,
    case: Case,
    findings: Sequence[Findings],
    known: Iterable[Ranked],
) -> list[Ranked]:
    """Where nothing names the cause: the first exception, else the first error, that no rule knows."""
    if any(tier < _TIERS[UNKNOWN] for tier, _, _ in known):
        return []
    line = next((found.unknown[0] for found in findings if found.unknown), None)
    if line is None and (state.state not in _FAILED or any(known)):
        return []
    if line is None:
        ends = [found.last for found in findings if found.last]
        text = state.message or f"exit code {state.exit_code}"
        line = Line(state.path, 1, text) if state.path and state.message else next(iter(ends), None)
    diagnosis = Diagnosis(
        rule=UNKNOWN,
        role=UNKNOWN,
        stage=stage,
        cause=f"no rule knows this failure: {line.body.strip() or line.text}"
        if line
        else f"the stage ended with exit code {state.exit_code} and left no log",
        fix="read the lines around it; --save_fixture keeps them as a test's fixture for a new rule",
        rerun=rerun_command(case, stage, line.path if line else None),
        evidence=line,
    )
    return [(_TIERS[UNKNOWN], line.number if line else 0, diagnosis)]


def rerun_command(case: Case, stage: str | None, log: Path | None = None) -> str:
    """The command that goes on from `stage`, or from the first one before it that is not done.

    Worked example: train failed: `python -m stages.ops run --recipe r.yaml --only train,bench`; where
    `log` is that of `train curve`, which no run of the chain repeats: `python -m stages.train curve`.
    """
    if log is not None and log.stem == _CURVE:
        return shlex.join(_command(case, "stages.train", _CURVE))
    if stage is None and case.kind != "launcher":
        return "the same command again"
    position = STAGES.index(stage) if stage in STAGES else 0
    if case.kind == "launcher":
        skips = [f"pipeline.task_{task}.skip=true" for task in range(position)]
        return shlex.join(["uv", "run", "launch.py", "--yaml", "YOUR.yaml", *skips, "--yes"])
    if case.run:
        states = [case.state(each).state for each in STAGES[:position]]
        known = any(state not in ("to do", "skipped") for state in states)
        position = next(
            (i for i, state in enumerate(states) if known and state not in ("done", "skipped")),
            position,
        )
    only = ["--only", ",".join(STAGES[position:])] if position else []
    return shlex.join([*_command(case, "stages.ops", "run"), *only])


def _command(case: Case, *words: str) -> list[str]:
    """The words of a command on the run's recipe, in its workspace."""
    recipe = str(case.run.recipe_path or "RECIPE") if case.run else "RECIPE"
    workspace = ["--workspace", str(case.run.paths.workspace)] if case.run else []
    return ["python", "-m", *words, "--recipe", recipe, *workspace]
