# SPDX-License-Identifier: Apache-2.0
"""From what the logs hold to what went wrong: the ranked diagnoses of a case.

The first stage of the chain that failed comes first: those after it fail for want of its output. In
a stage, its own last words come first where they name a cause; else the earliest line that does, for
a worker's first error precedes its engine's "see above"; else the earliest error that no rule knows,
shown with what stands around it and never guessed at; else a consequence, which says so.
"""

import dataclasses
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from shared.paths import STAGES
from stages.ops.look.triage.failure_rules import Rule, State, When
from stages.ops.look.triage.log_files import Case, LogFile, StageFacts
from stages.ops.look.triage.log_lines import ERROR, Line
from stages.ops.look.triage.log_scan import Findings, Hit, Scanner

UNKNOWN = "unknown"
_TIER = {"cause": 0, "generic": 1, "consequence": 3, "benign": 4}
_UNKNOWN_TIER = 2
_ENDED_BADLY: tuple[State, ...] = ("failed", "vanished")
_TEMPLATES = jinja2.Environment(
    autoescape=False
)  # rules are ours; their values are never templates


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """One answer to "what went wrong", with its evidence."""

    rule: str  # an id, or `unknown`
    role: str
    stage: str | None
    cause: str
    fix: str
    rerun: str
    evidence: Line | None
    source: str = ""


@dataclasses.dataclass
class Outcome:
    """What triage has to say about a case."""

    case: Case
    findings: list[tuple[LogFile, Findings]]
    diagnoses: list[Diagnosis]
    benign: list[Hit]

    @property
    def top(self) -> Diagnosis | None:
        return self.diagnoses[0] if self.diagnoses else None

    def of(self, stage: str | None) -> list[Diagnosis]:
        return [found for found in self.diagnoses if found.stage == stage]


def diagnose(case: Case, scanner: Scanner) -> Outcome:
    """Read all logs of the case and rank what they hold."""
    findings = [(log, scanner.scan(log.path, stage=log.stage)) for log in case.logs]
    stages: list[str | None] = [*STAGES, None]
    diagnoses: list[Diagnosis] = []
    for stage in stages:
        diagnoses += _of_stage(stage, case, findings, scanner)
    benign = [hit for _, found in findings for hit in found.hits if hit.rule.role == "benign"]
    return Outcome(case, findings, _without_repeats(diagnoses), benign)


def _of_stage(
    stage: str | None,
    case: Case,
    findings: Sequence[tuple[LogFile, Findings]],
    scanner: Scanner,
) -> list[Diagnosis]:
    facts = case.stages.get(stage or "", StageFacts())
    if facts.state in ("done", "stopped"):
        return []
    hits: list[Hit] = []
    errors: list[Line] = []
    for log, found in findings:
        if found.is_done.get(stage) and facts.state not in _ENDED_BADLY:
            continue
        # A line's own stage goes before its file's; both may be unknown.
        hits += [hit for hit in found.hits if (hit.line.stage or log.stage) == stage]
        errors += [line for line in found.errors if (line.stage or log.stage) == stage]
    if facts.message and facts.status and not any(hit.line.is_final for hit in hits):
        told = scanner.scan_text(facts.message, facts.status, stage=stage)
        hits, errors = hits + told.hits, errors + told.errors
    applying = [hit for hit in hits if _applies(hit.rule, stage, case)]
    errors += _left_over(hits, applying)
    hits = applying + _without_lines(stage, case, findings, scanner.rules)
    ranked = sorted(_first_of_each(_most_telling(hits, stage)), key=_rank)
    diagnoses = [diagnosis_of(hit, stage, case) for hit in ranked]
    return _with_unknown(diagnoses, errors, stage, case, facts)


def _left_over(hits: Iterable[Hit], applying: Iterable[Hit]) -> list[Line]:
    """Errors that a rule matched which does not apply here, and no other: nobody knows them."""
    known = {(hit.line.path, hit.line.number) for hit in applying}
    lines = [hit.line for hit in hits if (hit.line.path, hit.line.number) not in known]
    return [line for line in lines if ERROR.search(line.text)]


def _most_telling(hits: Iterable[Hit], stage: str | None) -> list[Hit]:
    """The failures, without those of which another rule says more on the same line."""
    failures = [hit for hit in hits if hit.rule.role != "benign"]
    beaten: set[tuple[str, Path, int]] = set()
    unbound: set[tuple[Path, int]] = set()
    for hit in failures:
        place = (hit.line.path, hit.line.number)
        beaten |= {(other, *place) for other in hit.rule.beats}
        if not hit.rule.stages:
            unbound.add(place)
    return [
        hit
        for hit in failures
        if (hit.rule.id, hit.line.path, hit.line.number) not in beaten
        # Whose log it is, is not known: what is said of any stage holds.
        and not (stage is None and hit.rule.stages and (hit.line.path, hit.line.number) in unbound)
    ]


def _rank(hit: Hit) -> tuple[bool, int, int, int]:
    """Last words that name a cause, then causes by line; of two on one line the longer expression."""
    is_last_word = hit.line.is_final and hit.rule.role == "cause"
    return (
        not is_last_word,
        _TIER[hit.rule.role],
        hit.line.number,
        -sum(map(len, hit.rule.lines)),
    )


def _first_of_each(hits: Sequence[Hit]) -> list[Hit]:
    """One hit a rule: its last words where it has such, else its first line."""
    best: dict[str, Hit] = {}
    for hit in hits:
        known = best.get(hit.rule.id)
        if known is None or _rank(hit) < _rank(known):
            best[hit.rule.id] = hit
    return list(best.values())


def _applies(rule: Rule, stage: str | None, case: Case) -> bool:
    if rule.stages and stage is not None and stage not in rule.stages:
        return False
    return rule.when is None or _holds(rule.when, stage, case)


def _holds(when: When, stage: str | None, case: Case) -> bool:
    facts = case.stages.get(stage or "", StageFacts())
    if when.exit_codes and facts.exit_code not in when.exit_codes:
        return False
    if when.states and facts.state not in when.states:
        return False
    for key, values in when.recipe.items():
        if case.setting(key) not in values:
            return False
    if not when.parent:
        return True
    before = STAGES[max(STAGES.index(stage) - 1, 0)] if stage in STAGES else ""
    return before != stage and case.stages.get(before, StageFacts()).state in when.parent


def _without_lines(
    stage: str | None,
    case: Case,
    findings: Sequence[tuple[LogFile, Findings]],
    rules: Sequence[Rule],
) -> list[Hit]:
    """The rules that only look at what a stage is, with the last line of its log as evidence."""
    if stage is None:
        return []
    last = [found.last for log, found in findings if log.stage == stage and found.last]
    status = case.stages.get(stage, StageFacts()).status
    line = last[-1] if last else Line(status, 1, 0, "") if status else None
    told = [rule for rule in rules if not rule.lines and _applies(rule, stage, case)]
    return [Hit(rule, line, {}) for rule in told] if line else []


def diagnosis_of(hit: Hit, stage: str | None, case: Case) -> Diagnosis:
    """What a hit means for this case: the rule's texts, filled in."""
    rule = hit.rule
    # A rule of one stage tells whose log it is, where nothing else does.
    whose = stage or (rule.stages[0] if len(rule.stages) == 1 else None)
    values = {
        # Not a dict: a group may be called as one of its methods is.
        "seen": types.SimpleNamespace(**{k: _number(text) for k, text in hit.seen.items()}),
        "recipe": case.setting,
        "stage": whose or "STAGE",
        "run": case.root or "RUN",
    }
    return Diagnosis(
        rule=rule.id,
        role=rule.role,
        stage=whose,
        cause=_render(rule.cause, values),
        fix=_render(rule.fix, values),
        rerun=rerun_command(case, _render(rule.redo, values) or whose, overwrite=rule.overwrite),
        evidence=hit.line,
        source=rule.source,
    )


def _number(text: str) -> str | int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 18 else text


def _render(template: str, values: Mapping[str, Any]) -> str:
    return " ".join(_TEMPLATES.from_string(template).render(values).split())


def _with_unknown(
    diagnoses: list[Diagnosis],
    errors: Sequence[Line],
    stage: str | None,
    case: Case,
    facts: StageFacts,
) -> list[Diagnosis]:
    """Where nothing names the cause, say so: the first error that no rule knows."""
    if any(_TIER[found.role] < _UNKNOWN_TIER for found in diagnoses):
        return diagnoses
    if not errors and (diagnoses or facts.state not in _ENDED_BADLY):
        return diagnoses
    line = min(errors, key=lambda error: error.number, default=None)
    if line is None and facts.status:
        line = Line(facts.status, 1, 0, facts.message)
    unknown = Diagnosis(
        rule=UNKNOWN,
        role=UNKNOWN,
        stage=stage,
        cause="no rule knows this failure; its first error is shown as it stands",
        fix="read it; a log that shows it well becomes a fixture with --save_fixture",
        rerun=rerun_command(case, stage),
        evidence=line,
    )
    return [unknown, *diagnoses]


def _without_repeats(diagnoses: Iterable[Diagnosis]) -> list[Diagnosis]:
    """Each rule once a stage, the first place kept."""
    kept: dict[tuple[str, str | None], Diagnosis] = {}
    for found in diagnoses:
        kept.setdefault((found.rule, found.stage), found)
    return list(kept.values())


def rerun_command(case: Case, stage: str | None, *, overwrite: bool = False) -> str:
    """The command that goes on from `stage`: finished stages before it are left as they are.

    Worked example: train failed: `--only train,bench`.
    """
    position = STAGES.index(stage) if stage in STAGES else 0
    if case.kind == "launcher":
        skips = " ".join(f"pipeline.task_{task}.skip=true" for task in range(position))
        return f"uv run launch.py --yaml YOUR.yaml {skips} --yes".replace("  ", " ")
    recipe = case.recipe_path or "RECIPE"
    command = f"python -m stages.ops run --recipe {recipe}"
    if case.workspace:
        command += f" --workspace {case.workspace}"
    command += f" --only {','.join(STAGES[position:])}" if position else ""
    return f"{command} --overwrite" if overwrite else command
