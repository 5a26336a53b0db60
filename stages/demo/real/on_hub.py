# SPDX-License-Identifier: Apache-2.0
"""Prompts that people wrote, from a hub: GSM8K's questions, and for the broad domain Dolly's instructions.

GSM8K (MIT) has test questions of its own, which are held out; of databricks-dolly-15k (CC BY-SA 3.0) some
rows are. Both data sets are taken at a fixed commit, so that the same command takes the same prompts.
"""

import dataclasses
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

from shared.prompts import sources
from shared.prompts.rows import Prompt
from shared.prompts.sources import Duplicates, Source
from stages.demo.real.given import Sides, shared_out
from stages.demo.real.written import Domain

LABEL = "make real's prompts"
_MAX_CHARS = 2_000  # of a prompt: the recipes' lengths hold it with its answer


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set; without `held_out` rows of the first source are held out."""

    train: Source
    held_out: Source | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.train, self.held_out) if self.held_out else (self.train,)


def _gsm8k(split: str) -> Source:
    commit = "740312add88f781978c0658806c59bc2815b9866"
    return Source(path="openai/gsm8k", subset="main", split=split, revision=commit)


_DOLLY = Source(
    path="databricks/databricks-dolly-15k",
    split="train",
    revision="bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a",
)
_GSM8K = DataSet(_gsm8k("train"), _gsm8k("test"))
DATA_SETS: dict[Domain, tuple[DataSet, ...]] = {
    "narrow": (_GSM8K,),
    "broad": (_GSM8K, DataSet(_DOLLY)),
}


def from_hub(domain: Domain, workspace: Path, *, rows: int, held_out: int, seed: int) -> Sides:
    """Both sides, a row of each data set in turn.

    Raises:
        UserError, RetryableError: the hub does not answer, or has not all of them.
    """
    chosen = DATA_SETS[domain]
    for each in chosen:  # before anything is loaded
        sources.require_answer(each.train, workspace, label=LABEL)
    sides = [
        _of_data_set(
            each,
            workspace,
            rows=_share(rows, number, len(chosen)),
            held_out=_share(held_out, number, len(chosen)),
            seed=seed,
        )
        for number, each in enumerate(chosen)
    ]
    return _in_turn([train for train, _ in sides]), _in_turn([test for _, test in sides])


def names(domain: Domain, workspace: Path) -> list[str]:
    """Each source with its commit, as `openai/gsm8k@740312a.../main/train`."""
    used = [source for each in DATA_SETS[domain] for source in each.sources]
    return [sources.digest(source, workspace, label=LABEL) for source in used]


def _share(count: int, number: int, parts: int) -> int:
    """The part `number` of a count: 5 in two parts are 3 and 2."""
    return len(range(number, count, parts))


def _of_data_set(data: DataSet, workspace: Path, *, rows: int, held_out: int, seed: int) -> Sides:
    train = _read(data.train, workspace)
    if data.held_out is None:
        return shared_out(train, rows=rows, held_out=held_out, seed=seed, where=data.train.path)
    test = _read(data.held_out, workspace)
    for each in (train, test):
        random.Random(seed).shuffle(each)
    taken = {prompt.opening for prompt in test[:held_out]}
    return [each for each in train if each.opening not in taken][:rows], test[:held_out]


def _read(source: Source, workspace: Path) -> list[Prompt]:
    """The different prompts of a source that are short enough, under its name where they have no category."""
    rows = Duplicates(same_content=True).marked(sources.read_source(source, workspace, label=LABEL))
    return [
        dataclasses.replace(each, category=each.category or source.name)
        for each in rows
        if isinstance(each, Prompt) and len(each.opening) <= _MAX_CHARS
    ]


def _in_turn(parts: Sequence[list[Prompt]]) -> list[Prompt]:
    groups = itertools.zip_longest(*parts)
    return [prompt for group in groups for prompt in group if prompt is not None]
