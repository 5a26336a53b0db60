# SPDX-License-Identifier: Apache-2.0
"""Are these the right states? Asked when they are captured, since the loss would never tell.

Legend: T tokens of a sample, A aux layers, H hidden size, V vocabulary.
"""

import dataclasses

import torch

from shared.errors import OutputError
from shared.target import TargetConfig, TargetTensors

_POSITIONS_PER_SHARD = 2048


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
    values = states.float()
    if not bool(torch.isfinite(values).all()):
        raise OutputError(f"sample {sample_id}: its states hold NaN or infinity.")
    magnitude = values.abs().amax(dim=(0, 2))  # [A+1]
    if bool((magnitude == 0).any()):
        raise OutputError(f"sample {sample_id}: a layer's states are all zero ({magnitude}).")
    if num_tokens > 1 and bool((values == values[:1]).all(dim=2).all(dim=0).any()):
        raise OutputError(f"sample {sample_id}: a layer's states are the same at every token.")


def logits(final: torch.Tensor, config: TargetConfig, tensors: TargetTensors) -> torch.Tensor:
    """The target's logits [T, V] from its final states [T, H] before the norm, in float32.

    RMS norm: y * rsqrt(mean(y^2) + eps) * weight; then lm_head, the logit scale and the softcap.
    """
    final = final.float()
    scale = torch.rsqrt(final.square().mean(-1, keepdim=True) + tensors.norm_eps)
    normed = final * scale * tensors.norm_weight.float()
    values = normed @ tensors.lm_head.float().T * config.logit_scale
    if config.logit_softcap:
        values = torch.tanh(values / config.logit_softcap) * config.logit_softcap
    return values


@dataclasses.dataclass
class Agreement:
    """How often the stored final state predicts the answer token that the target really gave.

    The state at token t predicts token t+1. Worked example: ids [7, 8, 20, 2] with loss mask
    [0, 0, 1, 1] asks the state at token 1 for 20 and the state at token 2 for 2.
    """

    config: TargetConfig
    tensors: TargetTensors
    hits: int = 0
    asked: int = 0

    def add(self, ids: torch.Tensor, mask: torch.Tensor, states: torch.Tensor) -> None:
        """Count one sample: ids [T], mask [T], states [T, A+1, H]."""
        predicting = mask[1:].nonzero().flatten()[:_POSITIONS_PER_SHARD]  # t where t+1 is an answer
        predicted = logits(states[predicting, -1], self.config, self.tensors).argmax(-1)
        self.hits += int((predicted == ids[1:][predicting]).sum())
        self.asked += predicting.numel()

    @property
    def share(self) -> float:
        return self.hits / self.asked if self.asked else 1.0

    def require(self, least: float, shard: str) -> None:
        """Refuse a shard whose states do not predict the target's own answers.

        Raises:
            OutputError: the share is below `least`.
        """
        if self.share < least:
            raise OutputError(
                f"{shard}: the target's argmax from the stored final states equals the greedy answer "
                f"token in {self.share:.1%} of {self.asked} positions, expected at least "
                f"{least:.0%}. Known causes: a missing final norm, a layer off by one, states of "
                "another request, a prefix cache, or a target other than the one that answered. "
                "Nothing of this shard was kept."
            )
