# SPDX-License-Identifier: Apache-2.0
"""Are these the right states? Checked when they are captured, since the loss would never show it.

A sample's states must be finite and alive. A shard answers two questions. Does the target's argmax,
from the stored final state, name the answer token that the target really gave? And, on a few probe
rows, do the log-probabilities rebuilt from the stored final state equal the engine's own? The second
sees faults of scale (a softcap, a logit scale, a norm that multiplies by 1 + w), which leave every
argmax as it was.

Legend: T tokens of a shard, A aux layers, H hidden size, V vocabulary, n positions checked.
"""

import dataclasses
from collections.abc import Mapping

import torch

from shared.target.tensors import TargetTensors
from stages.dump.backends.stats import Stats, measure
from stages.dump.plan import ShardRows

# 256 tell 90 % from 80 % nineteen times in twenty. One shard in eight pays for that; 64, which tell
# 90 % from 70 %, keep a writer's thread as fast as the engine on the others.
POSITIONS_A_SHARD, POSITIONS_OF_MOST = 256, 64
FULL_EVERY_SHARDS = 8
POSITIONS_A_PROBE = 64


class BadStates(Exception):
    """States that cannot be the target's: their row fails and is accounted for.

    Attributes:
        reason: as `rejects.jsonl` and the manifest's counts name it.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def check_sample(
    states: torch.Tensor, *, num_tokens: int, num_states: int, stats: Stats | None = None
) -> None:
    """Refuse states [T, A+1, H] that cannot be the target's.

    Args:
        stats: of these states, where the backend measured them.

    Raises:
        BadStates: wrong length, not finite, a layer of zeros, or one that never changes.
    """
    if states.shape[0] != num_tokens or states.shape[1] != num_states:
        raise BadStates(
            "states_wrong_shape",
            f"expected [{num_tokens}, {num_states}, H], found {list(states.shape)}; states come back "
            "short when prefix caching is on",
        )
    magnitude, is_constant, _ = stats or measure(states)
    if not bool(magnitude.isfinite().all()):
        raise BadStates("states_not_finite", "a layer holds NaN or infinity")
    if bool((magnitude == 0).any()):
        raise BadStates("states_zero", f"a layer's states are all zero (largest: {magnitude})")
    if num_tokens > 1 and bool(is_constant.any()):
        raise BadStates("states_constant", "a layer's states are the same at every token")


def token_logprobs(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[n]: log-probability in nats that logits [n, V] give to tokens [n]."""
    return torch.log_softmax(values, dim=-1).gather(-1, tokens[:, None])[:, 0]


def spread(positions: torch.Tensor, max_count: int) -> torch.Tensor:
    """At most `max_count` of `positions`, evenly chosen.

    Worked example: [3, 4, 8, 9, 12], max_count 2: [3, 8].
    """
    if positions.numel() <= max_count:
        return positions
    return positions[torch.arange(max_count) * positions.numel() // max_count]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How often the stored final state predicts the answer token that the target really gave."""

    hits: int
    positions: int

    @property
    def share(self) -> float:
        return self.hits / self.positions if self.positions else 1.0


@dataclasses.dataclass(frozen=True)
class Probe:
    """One row, checked at n of its positions.

    Attributes:
        states: [T_row, A+1, H], as stored.
        positions: [n] token t of the row, each with a successor.
        next_ids: [n] the token at t + 1.
        reported: [n] its log-probability in nats, by the engine.
    """

    states: torch.Tensor
    positions: torch.Tensor
    next_ids: torch.Tensor
    reported: torch.Tensor

    def gap(self, rebuilt: torch.Tensor) -> float:
        """Mean absolute difference in nats between logits [n, V] and the engine's report."""
        return float((token_logprobs(rebuilt, self.next_ids) - self.reported).abs().mean())


@dataclasses.dataclass
class ShardChecks:
    """A shard's states [T, A+1, H] compared with its tokens and with the engine's report."""

    tensors: TargetTensors
    rows: ShardRows
    states: torch.Tensor
    starts: list[int]

    def agreement(self, max_positions: int = POSITIONS_A_SHARD) -> Agreement:
        """The state at token t predicts token t+1, where that is an answer token of its row.

        Worked example: with ids [7, 8, 20, 2] and loss mask [0, 0, 1, 1], the state at token 1 must
        predict 20 and the state at token 2 must predict 2.
        """
        ids = torch.tensor([token for row in self.rows.input_ids for token in row])
        mask = torch.tensor([bit for row in self.rows.loss_masks for bit in row])
        mask[torch.tensor(self.starts[:-1])] = 0  # a row's first token has no state before it
        predicting = spread(mask[1:].nonzero().flatten(), max_positions)
        if not predicting.numel():
            return Agreement(0, 0)
        predicted = self.tensors.logits(self.states[predicting, -1]).argmax(-1)
        return Agreement(int((predicted == ids[1:][predicting]).sum()), predicting.numel())

    def probe(self, row: int, logprobs: torch.Tensor) -> Probe:
        """Row `row`, whose log-probabilities [T_row-1] the engine reported."""
        ids = torch.tensor(self.rows.input_ids[row])
        positions = spread(torch.arange(len(ids) - 1), POSITIONS_A_PROBE)
        states = self.states[self.starts[row] : self.starts[row + 1]]
        return Probe(states, positions, ids[positions + 1], logprobs[positions].float())

    def gaps(self, logprobs: Mapping[int, torch.Tensor]) -> dict[int, float]:
        """Row -> mean difference in nats between rebuilt and reported log-probabilities."""
        result = {}
        for row, reported in logprobs.items():
            if reported.numel():
                probe = self.probe(row, reported)
                final = probe.states[probe.positions, -1]
                result[row] = probe.gap(self.tensors.logits(final))
        return result
