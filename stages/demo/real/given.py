# SPDX-License-Identifier: Apache-2.0
"""Prompts of one source, as synth reads it, shared out: some to train on, others held out."""

import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from shared.errors import UserError
from shared.io.files import printable
from shared.prompts import sources
from shared.prompts.rows import BadRow, Prompt
from shared.prompts.sources import Duplicates, Source
from shared.runtime.wording import counted

LABEL = "--prompts"
Sides = tuple[list[Prompt], list[Prompt]]  # to train on, held out

logger = logging.getLogger(__name__)


def of_source(given: Source, workspace: Path, *, rows: int, held_out: int, seed: int) -> Sides:
    """Both sides of what a user gives, in an order by seed.

    Raises:
        UserError: it cannot be read, a row is no prompt, or too few of its prompts differ.
        RetryableError: it is a hub's, which does not answer.
    """
    sources.require_answer(given, workspace, label=LABEL)
    found = list(sources.read_source(given, workspace, label=LABEL))
    if bad := next(
        (each for each in found if isinstance(each, BadRow) and not each.is_skipped), None
    ):
        why = f" ({printable(bad.detail)})" if bad.detail else ""
        raise UserError(
            f"{LABEL}: {given.path}: {bad.row}: expected a prompt, found {bad.reason}{why}.",
            code="prompts-no-prompt",
            remedy='Give rows like {"id": ..., "prompt": ...} or {"messages": [...]}.',
            facts={"path": given.path, "row": bad.row, "reason": bad.reason},
        )
    unread = [each.row for each in found if isinstance(each, BadRow)]
    if unread:
        logger.warning("%s: files that are not read: %s", given.path, ", ".join(unread[:8]))
    prompts = [
        each for each in Duplicates(same_content=True).marked(found) if isinstance(each, Prompt)
    ]
    if repeated := len(found) - len(unread) - len(prompts):
        logger.warning("%s: left out as repetitions: %s", given.path, counted(repeated, "row"))
    return shared_out(prompts, rows=rows, held_out=held_out, seed=seed, where=given.path)


def shared_out(
    prompts: Sequence[Prompt], *, rows: int, held_out: int, seed: int, where: str
) -> Sides:
    """Both sides of prompts that all differ.

    What is held out begins as nothing else does, as far as the prompts allow it: the openings of fewest
    rows are held out first, and what is left of the last one of them is left out.

    Raises:
        UserError: there are too few.
    """
    mixed = list(prompts)
    random.Random(seed).shuffle(mixed)
    alike: defaultdict[str, list[Prompt]] = defaultdict(list)
    for prompt in mixed:
        alike[prompt.opening].append(prompt)
    testing = [each for group in sorted(alike.values(), key=len) for each in group][:held_out]
    taken = {each.opening for each in testing}
    training = [each for each in mixed if each.opening not in taken]
    if len(training) < held_out:
        raise UserError(
            f"{where}: expected at least {2 * held_out} different prompts, of which half have "
            f"openings that the others have not, found {len(mixed)} with {len(alike)} openings.",
            code="prompts-too-few",
            remedy="Half of them at most may be held out: give more.",
        )
    if siblings := len(mixed) - len(training) - len(testing):
        logger.warning(
            "%s: left out, since held-out ones begin alike: %s", where, counted(siblings, "row")
        )
    if (left_over := len(training) - rows) > 0:
        logger.warning(
            "%s: %d of %d rows are not used: this run takes %d and holds out %d",
            where,
            left_over,
            len(mixed),
            rows,
            held_out,
        )
    return training[:rows], testing
