# SPDX-License-Identifier: Apache-2.0
"""What the rules know in a log's last attempt, and which of its errors no rule knows."""

import dataclasses
import re
from collections.abc import Sequence

from stages.ops.look.triage.failure_rules import Rule
from stages.ops.look.triage.last_attempt import Attempt
from stages.ops.look.triage.log_lines import Line, classify, window
from stages.ops.look.triage.own_errors import OwnError, find_own_error

# Of a log that is full of errors only so many are looked at, from both ends.
_MAX_EVIDENCE = 1500
_END_LINES = 3
# After so many later lines, of which so many report ordinary work, an error was got over.
_LATER_LINES, _LATER_RECORDS, _LATER_PROGRESS = 20, 10, 3
_DONE = re.compile(r"(?:already )?done: .*manifest\.json$")
_PROGRESS = re.compile(
    r"(?:\b|_)loss\b|\bsteps?\b|\bepoch\b|\d(?:it|s)/(?:s|it)\b|\d+%\|", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Hit:
    """A rule, the line that it matched, and what its named groups held."""

    rule: Rule
    line: Line
    seen: dict[str, str]


@dataclasses.dataclass
class Findings:
    """What a log's last attempt holds.

    Attributes:
        hits: in the log's order; of one line the most specific rule first.
        unknown: exceptions and errors that no rule matches; without any, an end that looks like one.
        is_done: the stage itself reported its end, and no error after it.
        went_on: whatever failed, ordinary work followed it.
    """

    attempt: Attempt
    hits: list[Hit] = dataclasses.field(default_factory=list)
    benign: list[Hit] = dataclasses.field(default_factory=list)
    unknown: list[Line] = dataclasses.field(default_factory=list)
    own: OwnError | None = None
    is_done: bool = False
    went_on: bool = False
    last: Line | None = None

    @property
    def stage(self) -> str | None:
        return self.attempt.stage


def find(attempt: Attempt, rules: Sequence[Rule], stage: str | None) -> Findings:
    """What the rules say of an attempt; `stage` is whose log it is, where that is known."""
    lines = classify(attempt.path, attempt.lines)
    found = Findings(attempt, own=find_own_error(lines, stage))
    found.last = next((line for line in reversed(lines) if line.body.strip()), None)
    found.is_done = _is_done(lines)
    usable = [rule for rule in rules if rule.match and _may_apply(rule, stage)]
    last_bad = -1
    for index in _evidence(lines):
        line, hits = lines[index], _hits(lines, index, usable)
        benign = [hit for hit in hits if hit.rule.role == "benign"]
        if benign:
            found.benign += benign
            continue
        found.hits += hits
        if not hits and line.kind in ("exception", "error"):
            found.unknown.append(line)
        if hits or line.kind in ("exception", "error"):
            last_bad = index
    if not (found.hits or found.unknown or found.own or found.benign or found.is_done):
        found.unknown = _bad_end(_end(lines))
    found.went_on = last_bad >= 0 and not found.own and _works_on(lines[last_bad + 1 :])
    found.went_on |= _got_over(found, lines[last_bad + 1 :])
    # An exception says more than the errors around it.
    found.unknown.sort(key=lambda line: line.kind != "exception")
    return found


def _may_apply(rule: Rule, stage: str | None) -> bool:
    return not rule.stages or stage in rule.stages


def _evidence(lines: Sequence[Line]) -> list[int]:
    """Indices of the lines that can be evidence; of lines that differ in digits alone, the first."""
    seen: set[str] = set()
    chosen = []
    for index, line in enumerate(lines):
        key = re.sub(r"\d+", "0", line.body)
        if line.is_evidence and key not in seen:
            seen.add(key)
            chosen.append(index)
    if len(chosen) <= _MAX_EVIDENCE:
        return chosen
    return chosen[: _MAX_EVIDENCE // 2] + chosen[-_MAX_EVIDENCE // 2 :]


def _hits(lines: Sequence[Line], index: int, rules: Sequence[Rule]) -> list[Hit]:
    line, surroundings = lines[index], ""
    found: list[tuple[tuple[bool, int], Hit]] = []
    for rule in rules:
        if not (matched := rule.pattern.search(line.body)):
            continue
        if rule.near or rule.unless:
            surroundings = surroundings or window(lines, index)
            if not rule.holds_in(surroundings):
                continue
        seen = {name: value for name, value in matched.groupdict().items() if value is not None}
        # A rule with `near` is more specific; then the one that matched more of the line.
        found.append(((not rule.near, -len(matched[0])), Hit(rule, line, seen)))
    return [hit for _, hit in sorted(found, key=lambda each: each[0])]


def _is_done(lines: Sequence[Line]) -> bool:
    for line in reversed(lines):
        if line.kind == "ours":
            return False
        if line.stage and _DONE.match(line.body):
            return True
    return False


def _end(lines: Sequence[Line]) -> list[Line]:
    """The last lines that say something, the last one first."""
    return [line for line in reversed(lines) if line.body.strip()][:_END_LINES]


def _bad_end(end: Sequence[Line]) -> list[Line]:
    """The last line that sounds like a failure, unless the very last one reports success or work."""
    if end and (end[0].ends_well or _PROGRESS.search(end[0].body)):
        return []
    return [line for line in end if line.is_evidence and line.ends_badly][:1]


def _got_over(found: Findings, later: Sequence[Line]) -> bool:
    """All that is bad is vague, no exception stands for it, and success or progress follows."""
    evidence = [*(hit.line for hit in found.hits), *found.unknown]
    vague = all(hit.rule.role == "generic" for hit in found.hits)
    is_named = not vague or found.own or any(line.kind == "exception" for line in evidence)
    if not evidence or is_named or (last := found.last) is None:
        return False
    progress = [line for line in later if _PROGRESS.search(line.body)]
    # A bar that is drawn once more when its program ends is none.
    is_going = len(progress) >= _LATER_PROGRESS and progress[-1] is last
    return is_going or (last.ends_well and not found.unknown)


def _works_on(later: Sequence[Line]) -> bool:
    records = [line for line in later if line.kind == "quiet" or _PROGRESS.search(line.body)]
    return len(later) >= _LATER_LINES and len(records) >= _LATER_RECORDS
