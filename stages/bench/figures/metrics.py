# SPDX-License-Identifier: Apache-2.0
"""Turns vLLM's speculative-decoding counters into acceptance figures.

In: counters read before and after a measurement. Out: acceptance length, rate and per-position
figures, or an OutputError where the counters contradict each other. vLLM counts a verification in
full even where the answer ends inside it, so `accepted` may exceed the tokens of the answer. A step in
which a drafter (ngram) proposes nothing is not counted.

Worked example, K = 3, one answer of max_tokens = 6: the prefill yields token 1, a draft with 2 hits
yields tokens 2 to 4, a draft with 3 hits yields 5 to 8, of which 5 and 6 are kept. Counters:
drafts 2, draft tokens 6, accepted 5, by position [2, 2, 1]. Acceptance length 1 + 5/2 = 3.5.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from shared.errors import OutputError


@dataclass(frozen=True)
class Counters:
    """vLLM's `vllm:spec_decode_*` counters, or a difference or a sum of them."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: tuple[int, ...]  # [K]

    @classmethod
    def of(cls, values: Iterable[int]) -> "Counters":
        """From drafts, draft tokens, accepted tokens and the accepted ones by position, in a row."""
        drafts, drafted, accepted, *per_pos = values
        return cls(drafts, drafted, accepted, tuple(per_pos))

    @property
    def values(self) -> tuple[int, ...]:
        """As `of` takes them."""
        scalars = (self.num_drafts, self.num_draft_tokens, self.num_accepted_tokens)
        return (*scalars, *self.num_accepted_tokens_per_pos)

    @classmethod
    def from_histogram(cls, accepted_by_draft: Sequence[int], *, draft_tokens: int) -> "Counters":
        """From one request's [K+1] counts of drafts with j accepted tokens, j = 0 .. K.

        Position i (from 0) was accepted where more than i tokens were. Example, K = 3:
        [4, 0, 1, 2] is 7 drafts, 0 + 2 + 6 = 8 accepted tokens, by position [3, 3, 2].
        """
        per_pos = (sum(accepted_by_draft[i:]) for i in range(1, len(accepted_by_draft)))
        return cls(
            num_drafts=sum(accepted_by_draft),
            num_draft_tokens=draft_tokens,
            num_accepted_tokens=sum(j * count for j, count in enumerate(accepted_by_draft)),
            num_accepted_tokens_per_pos=tuple(per_pos),
        )


@dataclass(frozen=True)
class Acceptance:
    """How well a drafter did, with K the draft length."""

    acceptance_length: float  # tokens per drafted target step, 1 .. K+1
    acceptance_rate: float  # accepted / drafted tokens, 0 .. 1
    per_position: tuple[float, ...]  # [K] share of drafts accepted up to and including position i
    conditional: tuple[float | None, ...]  # [K] the same, given that position i - 1 was accepted
    num_drafts: int


def delta(before: Counters, after: Counters) -> Counters:
    """What was counted between two readings.

    Raises:
        OutputError: a counter ran backwards or the draft length changed: not one engine's readings.
    """
    early, late = before.num_accepted_tokens_per_pos, after.num_accepted_tokens_per_pos
    if len(early) != len(late):
        raise _contradiction(
            f"expected two readings of one engine, found {len(early)} draft positions before and "
            f"{len(late)} after"
        )
    difference = [b - a for a, b in zip(before.values, after.values, strict=True)]
    if min(difference) < 0:
        raise _contradiction(
            f"one ran backwards (before {before}, after {after}): the engine was restarted in between"
        )
    return Counters.of(difference)


def total(parts: Iterable[Counters], *, num_speculative_tokens: int) -> Counters:
    """The sum of `parts`: of one category's requests, say."""
    nothing = (0,) * (3 + num_speculative_tokens)
    return Counters.of(map(sum, zip(nothing, *(part.values for part in parts), strict=True)))


def check(counters: Counters, *, num_speculative_tokens: int, always_drafts: bool) -> None:
    """Hold a measurement's counters to what must be true of them.

    Args:
        counters: a delta over one measurement, or a sum over requests.
        num_speculative_tokens: K.
        always_drafts: the drafter proposes exactly K tokens at every step, as a draft head does.
            vLLM shortens drafts, and fills them with token 0, near max_model_len only, which
            `needed_model_len` keeps away. N-gram lookup proposes 0 to K tokens: False.

    Raises:
        OutputError: an invariant fails, with the numbers.
    """
    drafted, accepted = counters.num_draft_tokens, counters.num_accepted_tokens
    per_pos, depth = counters.num_accepted_tokens_per_pos, num_speculative_tokens
    full = depth * counters.num_drafts
    faults = {
        f"expected {depth} draft positions": len(per_pos) != depth,
        "expected the positions to sum to the accepted tokens": sum(per_pos) != accepted,
        "expected no position to be accepted more often than the one before it": any(
            late > early for early, late in pairwise(per_pos)
        ),
        "expected no position to be accepted more often than drafts were made": bool(per_pos)
        and per_pos[0] > counters.num_drafts,
        "expected no more accepted tokens than drafted ones": accepted > drafted,
        f"expected at most {depth} x drafts = {full} draft tokens": drafted > full,
        f"expected exactly {depth} x drafts = {full} draft tokens": always_drafts
        and drafted != full,
        "expected drafts, and none was made": always_drafts and counters.num_drafts == 0,
    }
    for expectation, failed in faults.items():
        if failed:
            raise _contradiction(f"{expectation}; {counters}")


def _contradiction(problem: str) -> OutputError:
    return OutputError(
        f"vLLM's speculative-decoding counters: {problem}.",
        code="counters-inconsistent",
        remedy="Measure again; if it is the same, report vLLM's version.",
    )


def acceptance(
    counters: Counters, *, num_speculative_tokens: int, always_drafts: bool
) -> Acceptance:
    """The figures of a measurement, checked first.

        acceptance_length = 1 + accepted / drafts         (1 where nothing was drafted)
        acceptance_rate   = accepted / draft_tokens       (0 where nothing was drafted)
        per_position[i]   = per_pos[i] / drafts
        conditional[i]    = per_pos[i] / per_pos[i - 1]   (i = 0: per_position[0]; None after a 0)

    Raises:
        OutputError: see `check`.
    """
    check(counters, num_speculative_tokens=num_speculative_tokens, always_drafts=always_drafts)
    drafts, per_pos = counters.num_drafts, counters.num_accepted_tokens_per_pos
    reached = (drafts, *per_pos[:-1])
    return Acceptance(
        acceptance_length=1.0 + counters.num_accepted_tokens / max(drafts, 1),
        acceptance_rate=counters.num_accepted_tokens / max(counters.num_draft_tokens, 1),
        per_position=tuple(count / max(drafts, 1) for count in per_pos),
        conditional=tuple(
            count / before if before else None
            for count, before in zip(per_pos, reached, strict=True)
        ),
        num_drafts=drafts,
    )


def decode_steps(counters: Counters, *, output_tokens: int) -> int:
    """Target steps after the prefill that one request took: drafted ones and, for n-gram, the rest.

        steps = drafts + max(0, output_tokens - 1 - drafts - accepted)

    The first token comes from the prefill; a drafted step yields 1 + accepted tokens, any other
    step yields one. Where the last draft overshot max_tokens, up to K undrafted steps stay hidden.
    `sum(output_tokens - 1) / sum(decode_steps)` over requests is the tokens per target step: for a
    draft head about its acceptance length, for n-gram the honest one of the two.
    """
    drafted = counters.num_drafts + counters.num_accepted_tokens
    return counters.num_drafts + max(0, output_tokens - 1 - drafted)


def first_divergence(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first index at which two token lists differ; None where they are equal.

    Where one is the beginning of the other, that is the shorter one's length.
    """
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))
