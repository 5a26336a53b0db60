# SPDX-License-Identifier: Apache-2.0
"""The part of preflight that is about rows: they can be read, and have the answers that their stage needs.

In: the first rows of each source. A stage reads all of them, and refuses what it finds then.
"""

import collections
import itertools
from collections.abc import Iterator
from pathlib import Path

from shared.conversations.reader import LEFT_OUT, Refused, answered_turns
from shared.errors import UserError
from shared.paths import find_input, places
from shared.prompts import sources
from shared.prompts.rows import BadRow, Prompt
from shared.prompts.sources import Duplicates, Source
from shared.runtime.wording import listed
from stages.ops.chain.inputs import prompt_sources
from stages.ops.chain.processes import Step
from stages.ops.chain.served import problem

# So many rows of each source are read: seconds, and enough to see what they are.
_MAX_ROWS = 20_000
_FORMS = "synth's README names the forms that a row may have; `columns` maps other names."
# What is to be done about rows without the answers that a stage takes from them.
_ANSWERS = {
    "keep": "Give rows with answers, or have the target answer: mode: regenerate.",
    "complete": "Give rows with every answer but the last, or set mode: regenerate.",
    "conversations": "Give rows with answers, or have synth answer them.",
}
_BENCH_LIMIT = 0.0  # a prompt that bench cannot use ends it


def input_problems(step: Step, workspace: Path) -> Iterator[str]:
    """Why what a stage reads from outside the run is nothing to work on; a hub is not asked."""
    for source in prompt_sources(step):
        if sources.is_on_hub(source, workspace):
            continue
        try:
            yield from _Look(step, source, workspace).problems()
        except UserError as error:
            yield str(error)
    if (states := step.settings.get("states")) and find_input(states, workspace) is None:
        expected = f"a folder at {places(states, workspace)}"
        yield problem("dump.states", expected, "none", "Mount it.")


class _Look:
    """What a stage will make of a source's first rows, by its own rules."""

    def __init__(self, step: Step, source: Source, workspace: Path) -> None:
        """Read and count them.

        Raises:
            UserError: a file cannot be read, or there is none.
        """
        self.settings = step.settings
        is_dump, is_bench = step.stage == "dump", step.stage == "bench"
        self.label = f"{step.stage}.{'conversations' if is_dump else 'prompts'}: {source.path}"
        self.mode = "conversations" if is_dump else self.settings.get("mode", "regenerate")
        self.limit = _BENCH_LIMIT if is_bench else float(self.settings["max_failed_fraction"])
        self.usable = self.failed = 0
        self.reasons: collections.Counter[str] = collections.Counter()
        read = sources.file_rows(source, workspace, self.label.partition(":")[0])
        same_content = bool(self.settings.get("deduplicate"))
        self.is_whole = self._count(Duplicates(same_content=same_content).marked(read))

    def _count(self, rows: Iterator[Prompt | BadRow]) -> bool:
        """Count rows as the stage will; returns whether these are all that it will read."""
        limit = self.settings.get("max_samples") or self.settings.get("max_prompts")
        prompts = 0
        for row in itertools.islice(rows, _MAX_ROWS):
            prompts += isinstance(row, Prompt)
            if isinstance(row, BadRow):
                reason, is_failed = row.reason, not row.is_skipped
            else:
                reason = self._unanswered(row)
                is_failed = bool(reason) and reason != LEFT_OUT and self.mode != "conversations"
            self.usable += not reason
            self.failed += is_failed
            self.reasons.update([reason] if reason else [])
            if prompts == limit:
                break
        is_all = prompts == limit or next(rows, None) is None
        return is_all and not self.settings.get("sources") and not self.settings.get("shuffle")

    def _unanswered(self, row: Prompt) -> str:
        """Why a row lacks the answers that are not the target's to give; '' where it does not."""
        if self.mode == "complete":
            is_open = any(turn.answer is None for turn in row.turns[:-1])
            return "unanswered_turn" if is_open else ""
        if self.mode == "regenerate":
            return ""
        try:
            answered_turns(row)
        except Refused as refused:
            return refused.reason
        return ""

    def problems(self) -> Iterator[str]:
        """Why nothing comes of the rows, or too little."""
        rows = self.usable + self.reasons.total()
        is_too_little = self.is_whole and self.failed > self.limit * rows
        if self.usable and not is_too_little:
            return
        why = listed(self.reasons, 3)
        lacks_answers = {"no_answer", "unanswered_turn", LEFT_OUT} & self.reasons.keys()
        yield problem(
            self.label,
            f"at most {self.limit:.0%} of the rows unusable"
            if self.usable
            else "rows that can be used",
            f"{self.failed:,} of {rows:,} ({why})"
            if self.usable
            else f"none ({why or 'it is empty'})",
            _ANSWERS[self.mode] if lacks_answers else _FORMS,
        )
