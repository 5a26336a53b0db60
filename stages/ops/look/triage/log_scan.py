# SPDX-License-Identifier: Apache-2.0
"""Finds what the rules know in a log of any size, line by line, in bounded memory.

In: a file of bytes, rules. Out: for the log's last attempt, the lines that rules match and the first
errors that none does, each with its line number and its place in the file.

Two steps. Every line is searched for all fixed texts of all rules at once (`text_search.py`): about
150 MB/s a core, whatever the number of rules. The few lines that have one go through the rules'
expressions; of those that merely look like an error the first few are kept. A run's log
holds every attempt: `begin:` starts a new one, and what was found before it is forgotten.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow

from shared.errors import UserError
from shared.paths import STAGES
from stages.ops.look.triage.failure_rules import Rule
from stages.ops.look.triage.log_lines import (
    CHAIN,
    DONE,
    ERROR,
    NO_ERROR,
    OWN,
    Line,
    chunks,
    clean,
    split,
)
from stages.ops.look.triage.text_search import Watch, having, matching

# Of one rule in one attempt so many hits are kept, and so many counted before it is left alone.
KEPT_HITS = 5
COUNTED_HITS = 500
# So few lines are looked at one by one sooner than RE2 has learnt the texts.
FEW_LINES = 1000
KEPT_ERRORS = 20
_REMEMBERED = 100_000


@dataclasses.dataclass
class Hit:
    """A rule that matched, the line that completed it, and what its named groups held."""

    rule: Rule
    line: Line
    seen: dict[str, str]


@dataclasses.dataclass
class Findings:
    """What one log's last attempt holds; per stage where the log is of several."""

    path: Path
    hits: list[Hit] = dataclasses.field(default_factory=list)
    errors: list[Line] = dataclasses.field(default_factory=list)  # that no rule matches
    num_errors: int = 0
    attempts: int = 0
    is_done: dict[str | None, bool] = dataclasses.field(default_factory=dict)
    last: Line | None = None
    num_bytes: int = 0
    num_lines: int = 0


class Scanner:
    """The rules, ready to be looked for in many logs."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._rules = [rule for rule in rules if rule.lines]
        self._watch = Watch(self._rules)

    def scan(self, path: Path, *, stage: str | None = None) -> Findings:
        """What `path` holds; `stage` is whose log it is, where that is known.

        Raises:
            UserError: the file cannot be read.
        """
        scan = _Scan(self._rules, self._watch, path, stage)
        try:
            with path.open("rb", buffering=0) as log:
                for first_number, offset, lines in chunks(log):
                    scan.take(first_number, offset, lines)
        except OSError as error:
            raise UserError(f"could not read {path}: {error.strerror or error}.") from error
        return scan.findings

    def scan_text(self, text: str, path: Path, *, stage: str | None) -> Findings:
        """The same of a text that stands in `path`, such as a status file's message."""
        scan = _Scan(self._rules, self._watch, path, stage)
        record = f"1970-01-01T00:00:00Z ERROR {stage or 'ops'} {text}\n".encode()
        scan.take(1, 0, record)
        return scan.findings


class _Scan:
    """One log on its way through the rules."""

    def __init__(self, rules: Sequence[Rule], watch: Watch, path: Path, stage: str | None) -> None:
        self._rules = rules
        self._all = self._watch = watch
        self.findings = Findings(path)
        self._stage = stage
        self._begin(None)

    def _begin(self, stage: str | None) -> None:
        """A new attempt: forget what was found of this stage before."""
        found = self.findings
        found.hits = [hit for hit in found.hits if stage and hit.line.stage != stage]
        found.errors = [line for line in found.errors if stage and line.stage != stage]
        found.num_errors = len(found.errors)
        self._counts = collections.Counter(hit.rule.id for hit in found.hits)
        self._progress: dict[str, tuple[int, int, dict[str, str]]] = {}
        self._nothing: set[bytes] = set()
        self._watch = self._all
        self._is_stale = False

    def _watch_less(self) -> None:
        """Leave out the rules that were told often enough: a log may hold nothing else."""
        rules = [rule for rule in self._rules if self._counts[rule.id] < COUNTED_HITS]
        self._watch = Watch(rules, errors=self.findings.num_errors < COUNTED_HITS)
        self._is_stale = False

    def take(self, first_number: int, offset: int, lines: bytes) -> None:
        """Search whole lines, of which the first has this number and this offset in the file."""
        if self._is_stale:
            self._watch_less()
        starts, values = split(lines)
        for index, is_known in self._candidates(values, first_number):
            start = int(starts[index])
            line = lines[start : int(starts[index + 1]) - 1]
            # An error that no rule has a text in: its like, but for digits, is none either.
            key = b"" if is_known else line.translate(None, b"0123456789")
            if key in self._nothing:
                continue
            where = (first_number + index, offset + start)
            # A progress bar rewrites its line: every piece of it is a line to the reader.
            # Not any(): every piece must be looked at.
            told = [self._look(piece, *where) for piece in line.split(b"\r") if piece]
            if key and not any(told) and len(self._nothing) < _REMEMBERED:
                self._nothing.add(key)
        self._close(first_number, offset, lines, len(values))

    def _candidates(self, values: pyarrow.Array, number: int) -> Iterable[tuple[int, bool]]:
        """(index, whether a rule's text is in it) of the lines that are worth a look."""
        if len(values) <= FEW_LINES:
            return ((index, True) for index in range(len(values)))
        watch, search = self._watch, self._watch.first
        found, some = matching(values, search.pattern)
        if self._is_waiting(number) or (watch.openers and having(some, watch.openers).any()):
            search = watch.whole
            found, some = matching(values, search.pattern)
        return zip(found.tolist(), having(some, search.known).tolist(), strict=True)

    def _is_waiting(self, number: int) -> bool:
        """Whether a rule whose first line came waits for its next, `number` lines into the log."""
        return any(
            rule.id in self._progress and number - self._progress[rule.id][1] <= rule.within_lines
            for rule in self._rules
        )

    def _close(self, first_number: int, offset: int, lines: bytes, count: int) -> None:
        found = self.findings
        found.num_bytes = offset + len(lines)
        found.num_lines = first_number + count - 1
        body = lines.rstrip()
        if body:
            start = body.rfind(b"\n") + 1
            number = first_number + body.count(b"\n")
            found.last = Line(found.path, number, offset + start, clean(body[start:]), self._stage)

    def _look(self, raw: bytes, number: int, offset: int) -> bool:
        """Whether the line told anything, so that its like must be looked at again."""
        text = clean(raw)
        own = OWN.search(text)
        stage = own["stage"] if own and own["stage"] in STAGES else self._stage
        if own and self._mark(own):
            return True
        is_final = bool(own) and own["level"] == "ERROR" and own["stage"] != "ops"  # type: ignore[index]
        line = Line(self.findings.path, number, offset, text, stage, is_final)
        if is_final:
            self.findings.is_done[stage] = False
        hits, is_part = self._match(line)
        benign = [hit for hit in hits if hit.rule.role == "benign"]
        for hit in benign or hits:
            self._keep(hit)
        if not hits and not is_part and ERROR.search(text) and not NO_ERROR.search(text):
            self._keep_error(line)
            return len(self.findings.errors) < KEPT_ERRORS
        # The like of a harmless line is as harmless, and five of a kind are enough.
        kept = any(self._counts[hit.rule.id] < KEPT_HITS for hit in hits)
        return is_part or is_final or (kept and not benign)

    def _mark(self, own: "re.Match[str]") -> bool:
        """Whether it is a line that says where in its life a stage is."""
        text = own["text"].rstrip()
        if own["stage"] == "ops":
            if chained := CHAIN.match(text):
                self._stage = chained[1]
            return bool(chained)
        if own["level"] != "INFO":
            return False
        if text.startswith("begin: process "):
            self._begin(own["stage"])
            self.findings.attempts += 1
            self._stage = own["stage"]
            self.findings.is_done[self._stage] = False
            return True
        if DONE.match(text):
            self.findings.is_done[own["stage"]] = True
            return True
        return False

    def _match(self, line: Line) -> tuple[list[Hit], bool]:
        """(rules that this line completes, whether it is a part of one that waits for more)."""
        lowered = line.text.lower()
        hits: list[Hit] = []
        is_part = False
        for text in self._watch.texts_in(lowered):
            for rule, position in self._watch.by_text[text]:
                if any(hit.rule is rule for hit in hits):
                    continue
                found = rule.patterns[position].search(line.text)
                if found is None:
                    continue
                seen = self._advance(rule, position, line.number, found)
                if seen is None:
                    is_part = is_part or self._progress.get(rule.id, (0, 0, {}))[0] > 0
                else:
                    hits.append(Hit(rule, line, seen))
        return hits, is_part

    def _advance(
        self, rule: Rule, position: int, number: int, found: "re.Match[str]"
    ) -> dict[str, str] | None:
        """The captures of all its lines, where this one was the last that the rule waited for."""
        named = {name: value for name, value in found.groupdict().items() if value is not None}
        if len(rule.patterns) == 1:
            return named
        due, last, seen = self._progress.get(rule.id, (0, number, {}))
        if number - last > rule.within_lines:
            due, seen = 0, {}
        if position == due:
            seen = {**seen, **named}
            due += 1
        elif position != 0:
            return None
        if due < len(rule.patterns):
            self._progress[rule.id] = (due, number, seen)
            return None
        self._progress.pop(rule.id, None)
        return seen

    def _keep(self, hit: Hit) -> None:
        self._counts[hit.rule.id] += 1
        count = self._counts[hit.rule.id]
        self._is_stale = self._is_stale or count == COUNTED_HITS
        # Past the first few only a stage's last words matter.
        if count <= KEPT_HITS or hit.line.is_final:
            self.findings.hits.append(hit)

    def _keep_error(self, line: Line) -> None:
        found = self.findings
        found.num_errors += 1
        self._is_stale = self._is_stale or found.num_errors == COUNTED_HITS
        if len(found.errors) < KEPT_ERRORS:
            found.errors.append(line)
