# SPDX-License-Identifier: Apache-2.0
"""Are these the right states? Asked when they are captured, since the loss would never tell.

Two questions a shard. Does the target's argmax, from the stored final state, name the answer token
that the target really gave? And, on a few probe rows, do the log-probabilities rebuilt from the
stored final state equal the engine's own? The second sees faults of scale (a softcap, a logit scale,
a norm that multiplies by 1 + w), which leave every argmax as it was.

Legend: T tokens of a shard, A aux layers, H hidden size, V vocabulary, n positions asked.
"""

import dataclasses
from collections.abc import Mapping

import torch

from shared.errors import OutputError
from shared.target.model import TargetConfig, TargetTensors
from stages.dump.plan import ShardRows

# Enough to tell 90 % from 80 % nineteen times in twenty, and little beside the shard's own prefill.
POSITIONS_A_SHARD = 256
POSITIONS_A_PROBE = 64
# Rows of lm_head that are held as float32 at once.
_HEAD_ROWS = 16384


def check_sample(sample_id: str, states: torch.Tensor, *, num_tokens: int, num_states: int) -> None:
    """Refuse states [T, A+1, H] that cannot be the target's.

    Raises:
        OutputError: wrong length, not finite, a layer of zeros, or one that never changes.
    """
    if states.shape[0] != num_tokens or states.shape[1] != num_states:
        raise OutputError(
            f"sample {sample_id}: expected states [{num_tokens}, {num_states}, H], found "
            f"{list(states.shape)}. States come back short when prefix caching is on."
        )
    magnitude = states.abs().amax(dim=(0, 2)).float()  # [A+1]; NaN and infinity come through
    if not bool(magnitude.isfinite().all()):
        raise OutputError(f"sample {sample_id}: its states hold NaN or infinity.")
    if bool((magnitude == 0).any()):
        raise OutputError(f"sample {sample_id}: a layer's states are all zero ({magnitude}).")
    for layer in states.unbind(dim=1) if num_tokens > 1 else ():
        # First against last alone, as nearly always that settles it.
        if torch.equal(layer[0], layer[-1]) and bool((layer == layer[0]).all()):
            raise OutputError(f"sample {sample_id}: a layer's states are the same at every token.")


def final_norm(final: torch.Tensor, tensors: TargetTensors, *, offset: float = 0.0) -> torch.Tensor:
    """RMS norm of [n, H]: y * rsqrt(mean(y^2) + eps) * (weight + offset), in float32."""
    final = final.float()
    scale = torch.rsqrt(final.square().mean(-1, keepdim=True) + tensors.norm_eps)
    return final * scale * (tensors.norm_weight.float() + offset)


def head_logits(normed: torch.Tensor, config: TargetConfig, tensors: TargetTensors) -> torch.Tensor:
    """Logits [n, V] of normed states [n, H]: lm_head, the logit scale, then the softcap."""
    parts = [normed.float() @ rows.float().T for rows in tensors.lm_head.split(_HEAD_ROWS)]
    values = torch.cat(parts, dim=-1) * config.logit_scale
    if config.logit_softcap:
        values = torch.tanh(values / config.logit_softcap) * config.logit_softcap
    return values


def logits(final: torch.Tensor, config: TargetConfig, tensors: TargetTensors) -> torch.Tensor:
    """The target's logits [n, V] from its final states [n, H] before the norm, in float32."""
    return head_logits(final_norm(final, tensors), config, tensors)


def token_logprobs(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[n]: log-probability in nats that logits [n, V] give to tokens [n]."""
    return torch.log_softmax(values, dim=-1).gather(-1, tokens[:, None])[:, 0]


def spread(positions: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of `positions`, evenly chosen.

    Worked example: [3, 4, 8, 9, 12], most 2: [3, 8].
    """
    if positions.numel() <= most:
        return positions
    return positions[torch.arange(most) * positions.numel() // most]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How often the stored final state predicts the answer token that the target really gave."""

    hits: int
    asked: int

    @property
    def share(self) -> float:
        return self.hits / self.asked if self.asked else 1.0


@dataclasses.dataclass(frozen=True)
class Probe:
    """One row, asked at n of its positions.

    Attributes:
        states: [T_row, A+1, H], as stored.
        positions: [n] token t of the row, each with a successor.
        next_ids: [n] the token at t + 1.
        told: [n] what the engine says is its log-probability.
    """

    states: torch.Tensor
    positions: torch.Tensor
    next_ids: torch.Tensor
    told: torch.Tensor

    def gap(self, rebuilt: torch.Tensor) -> float:
        """Mean absolute difference in nats between logits [n, V] and what the engine says."""
        return float((token_logprobs(rebuilt, self.next_ids) - self.told).abs().mean())


@dataclasses.dataclass
class ShardChecks:
    """A shard's states [T, A+1, H] held against its tokens and against the engine's word."""

    config: TargetConfig
    tensors: TargetTensors
    rows: ShardRows
    states: torch.Tensor
    starts: list[int]

    def agreement(self) -> Agreement:
        """The state at token t predicts token t+1, where that is an answer token of its row.

        Worked example: ids [7, 8, 20, 2] with loss mask [0, 0, 1, 1] asks the state at token 1 for
        20 and the state at token 2 for 2.
        """
        ids = torch.tensor([token for row in self.rows.input_ids for token in row])
        mask = torch.tensor([bit for row in self.rows.loss_masks for bit in row])
        mask[torch.tensor(self.starts[:-1])] = 0  # a row's first token has no state before it
        predicting = spread(mask[1:].nonzero().flatten(), POSITIONS_A_SHARD)
        if not predicting.numel():
            return Agreement(0, 0)
        predicted = logits(self.states[predicting, -1], self.config, self.tensors).argmax(-1)
        return Agreement(int((predicted == ids[1:][predicting]).sum()), predicting.numel())

    def probe(self, row: int, logprobs: torch.Tensor) -> Probe:
        """Row `row`, whose log-probabilities [T_row-1] the engine told."""
        ids = torch.tensor(self.rows.input_ids[row])
        positions = spread(torch.arange(len(ids) - 1), POSITIONS_A_PROBE)
        states = self.states[self.starts[row] : self.starts[row + 1]]
        return Probe(states, positions, ids[positions + 1], logprobs[positions].float())

    def gaps(self, logprobs: Mapping[int, torch.Tensor]) -> dict[int, float]:
        """Row -> mean difference in nats between rebuilt and told log-probabilities."""
        found = {}
        for row, told in logprobs.items():
            if told.numel():
                probe = self.probe(row, told)
                final = probe.states[probe.positions, -1]
                found[row] = probe.gap(logits(final, self.config, self.tensors))
        return found
