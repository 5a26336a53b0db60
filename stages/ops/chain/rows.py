# SPDX-License-Identifier: Apache-2.0
"""What the stages will make of the rows that they read from files: how many are left, and why not all.

In: the first rows of each source. A stage reads all of them, and refuses what it finds then.
"""

import collections
import itertools
from collections.abc import Iterator
from pathlib import Path

from shared.conversations.reader import SKIPPED
from shared.errors import UserError
from shared.prompts import sources
from shared.prompts.rows import BadRow, Prompt
from shared.prompts.sources import Duplicates, Source
from stages.ops.chain.asked import Asked
from stages.ops.chain.inputs import prompt_sources
from stages.ops.chain.processes import Step

# So many rows of each source are read: seconds, and enough to see what they are.
_MAX_ROWS = 20_000
_BENCH_LIMIT = 0.0  # a prompt that bench cannot use ends it


class Look:
    """A source's first rows, by the rules of the stage that reads them.

    Attributes:
        usable: rows of which something comes, as far as anybody looked.
        failed: rows that the stage will count as failures.
        reasons: of all rows that are not usable.
        is_whole: whether the stage reads no further rows.
    """

    def __init__(self, step: Step, source: Source, workspace: Path) -> None:
        """Read and count them.

        Raises:
            UserError: a file cannot be read, or there is none.
        """
        settings = step.settings
        is_dump, is_bench = step.stage == "dump", step.stage == "bench"
        self.label = f"{step.stage}.{'conversations' if is_dump else 'prompts'}: {source.path}"
        self.mode = "conversations" if is_dump else settings.get("mode", "regenerate")
        self.limit = _BENCH_LIMIT if is_bench else float(settings["max_failed_fraction"])
        self.usable = self.failed = self._prompts = self._unseen = 0
        self.reasons: collections.Counter[str] = collections.Counter()
        self._asked = None if is_bench else Asked(step, self.mode, workspace)
        read = sources.file_rows(source, workspace, self.label.partition(":")[0])
        marked = Duplicates(same_content=bool(settings.get("deduplicate"))).marked(read)
        limit = settings.get("max_samples") or settings.get("max_prompts")
        is_all = self._count(marked, limit)
        self.is_whole = is_all and not settings.get("sources") and not settings.get("shuffle")

    def _count(self, rows: Iterator[Prompt | BadRow], limit: int | None) -> bool:
        """Count rows as the stage will; returns whether these are all that it will read."""
        for row in itertools.islice(rows, _MAX_ROWS):
            if isinstance(row, BadRow):
                reason: str | None = row.reason
                self.failed += not row.is_skipped
            else:
                self._prompts += 1
                reason = self._asked.reason(row) if self._asked else ""
                is_skip = reason in SKIPPED or self.mode == "conversations"
                self.failed += bool(reason) and not is_skip
            self._unseen += reason is None
            self.usable += not reason
            self.reasons.update([reason] if reason else [])
            if self._prompts == limit:
                break
        return self._prompts == limit or next(rows, None) is None

    @property
    def rows(self) -> int:
        """All rows, whatever becomes of them."""
        return self.usable + self.reasons.total()

    @property
    def is_left_out(self) -> bool:
        """Whether rows are there and all of them are left out on purpose: no failure of the stage's."""
        return bool(self.rows) and not self.usable and not self.failed

    @property
    def left(self) -> float:
        """The share of its prompts that something comes of; of those unseen as of the ones seen."""
        seen = self._prompts - self._unseen
        return (self.usable - self._unseen) / seen if seen else 1.0


class Looks:
    """The stages' sources in files, each of them looked at once."""

    def __init__(self, workspace: Path) -> None:
        self._workspace = workspace
        self._seen: dict[str, list[Look | UserError]] = {}

    def of(self, step: Step) -> list[Look | UserError]:
        """What a stage's sources hold, or why one cannot be read; those on a hub are left out."""
        if step.stage not in self._seen:
            self._seen[step.stage] = [
                self._look(step, source)
                for source in prompt_sources(step)
                if not sources.is_on_hub(source, self._workspace)
            ]
        return self._seen[step.stage]

    def left(self, step: Step) -> float:
        """The share of a stage's prompts that something comes of, over all of its sources."""
        found = [each for each in self.of(step) if isinstance(each, Look)]
        rows = sum(each.rows for each in found)
        return sum(each.left * each.rows for each in found) / rows if rows else 1.0

    def _look(self, step: Step, source: Source) -> Look | UserError:
        try:
            return Look(step, source, self._workspace)
        except UserError as error:
            return error
