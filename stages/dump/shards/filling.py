# SPDX-License-Identifier: Apache-2.0
"""A shard in the making: states arrive row by row, and each row is checked as it comes."""

import dataclasses
import itertools
from collections.abc import Callable

import torch

from shared.contracts import fp8
from shared.errors import OutputError
from stages.dump.backends.base import Captured
from stages.dump.backends.stats import measure
from stages.dump.checks.checks import BadStates, check_sample
from stages.dump.plan import ShardPlan, ShardRows

# Three bits of mantissa round an entry by at most 6.25 %; entries below the smallest count for little.
MAX_FP8_ERROR = 0.07
# A row that was left out of its shard, as sidecar and `rejects.jsonl` list it: row, failed (the
# reason) and detail.
Failure = dict[str, str]
# Called for each row that arrives with its number of tokens, and its failure if it failed.
Report = Callable[[int, Failure | None], None]


@dataclasses.dataclass
class FillingShard:
    """A shard in the making: room for all its states, and the rows still missing.

    Attributes:
        failed: row -> why its states cannot be the target's.
    """

    plan: ShardPlan
    rows: ShardRows
    states: torch.Tensor  # [T, A+1, H] bfloat16
    probes: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    failed: dict[int, Failure] = dataclasses.field(default_factory=dict)
    missing: set[int] = dataclasses.field(init=False)
    starts: list[int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.missing = set(range(len(self.rows.input_ids)))
        self.starts = _starts(self.rows)

    def put(self, row: int, captured: Captured) -> None:
        """Take the states of `row`, or note that they cannot be the target's.

        Raises:
            OutputError: what the engine measured of them is not what arrived.
        """
        target = self.states[self.starts[row] : self.starts[row + 1]]
        num_tokens, num_states = target.shape[:2]
        self.missing.discard(row)
        try:
            check_sample(
                captured.states, num_tokens=num_tokens, num_states=num_states, stats=captured.stats
            )
        except BadStates as error:
            name = self.rows.sample_ids[row]
            self.failed[row] = {"row": name, "failed": error.reason, "detail": error.detail}
            return
        if captured.logprobs is not None:
            _check_stats(self.rows.sample_ids[row], captured)
            self.probes[row] = captured.logprobs
        target.copy_(captured.states)

    def without_failed(self) -> "FillingShard":
        """The same shard with the rows that did not fail, numbered anew."""
        if not self.failed:
            return self
        kept = [row for row in range(len(self.rows.input_ids)) if row not in self.failed]
        rows = ShardRows(*([values[row] for row in kept] for values in vars(self.rows).values()))
        parts = [self.states[self.starts[row] : self.starts[row + 1]] for row in kept]
        states = torch.cat(parts) if parts else self.states[:0]
        probes = {kept.index(row): logprobs for row, logprobs in self.probes.items()}
        return FillingShard(self.plan, rows, states, probes)

    def round_to_fp8(self) -> None:
        """Round the aux states to what fp8 stores, in place, so that the checks see the stored ones.

        Raises:
            OutputError: a token loses more than rounding can explain.
        """
        for start, stop in itertools.pairwise(self.starts):
            aux = self.states[start:stop, :-1]
            rounded = fp8.decode(*fp8.encode(aux))
            error = (rounded - aux).float().norm(dim=-1) / aux.float().norm(dim=-1).clamp(min=1e-30)
            if not bool((error <= MAX_FP8_ERROR).all()):
                raise OutputError(
                    f"shard {self.plan.index}: fp8 changes a state by {float(error.max()):.0%} of its "
                    f"norm, expected at most {MAX_FP8_ERROR:.0%}.",
                    code="states-not-for-fp8",
                    remedy="Set dump.state_dtype: bfloat16 for this target.",
                    facts={"shard": self.plan.index},
                )
            aux.copy_(rounded)


def _starts(rows: ShardRows) -> list[int]:
    """[N+1] where each row begins among the shard's tokens."""
    starts = [0]
    for ids in rows.input_ids:
        starts.append(starts[-1] + len(ids))
    return starts


def _check_stats(sample_id: str, captured: Captured) -> None:
    """A sample of all rows, the probes, is measured again where it arrived."""
    if captured.stats is None:
        return
    pairs = zip(measure(captured.states), captured.stats, strict=True)
    if not all(torch.equal(arrived, reported) for arrived, reported in pairs):
        raise OutputError(
            f"sample {sample_id}: its states are not those that the engine measured before it copied "
            "them.",
            code="states-changed-in-copy",
            remedy="Run the same command again; if it happens again, set backend: hf and report it.",
            facts={"sample": sample_id},
        )
