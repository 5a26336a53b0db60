# SPDX-License-Identifier: Apache-2.0
"""The target's output layer: from its last state before the final norm to logits.

Shapes: T tokens, C rows of a chunk, H hidden size, V target vocabulary, D draft vocabulary.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.target.tensors import FinalNorm
from stages.train.kernels.precision import at_least_float32


@dataclasses.dataclass(frozen=True)
class TargetOutput:
    """From the target's last state before the final norm to logits over the draft vocabulary.

    Attributes:
        norm: the final norm.
        lm_head: [D, H] the rows of the draft vocabulary, in draft order.
        logit_scale: factor on the logits.
        softcap: c of c * tanh(logits / c), or None.
    """

    norm: FinalNorm
    lm_head: Tensor
    logit_scale: float = 1.0
    softcap: float | None = None

    def products(self, finals: Tensor) -> Tensor:
        """[C, H] states to [C, D] products with lm_head, in its dtype, without scale and softcap."""
        return F.linear(self.norm(finals).to(self.lm_head.dtype), self.lm_head)

    def logits(self, finals: Tensor) -> Tensor:
        """[C, H] states before the final norm to [C, D] logits, float32 or wider."""
        logits = at_least_float32(self.products(finals))
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def shares_in_vocab(
    finals: Tensor, whole: TargetOutput, inside: Tensor, *, chunk_rows: int = 256
) -> Tensor:
    """[T] float32: the target's probability of all tokens inside, at each token; 0 where its argmax is not.

    It is made once for the data: `Batch.in_vocab`.

    Args:
        whole: the target's output over its full vocabulary.
        inside: [V] bool, the tokens of the draft vocabulary.

    Worked example: p = [0.5, 0.3, 0.2]; with the first and the last token inside 0.7, with the last two 0.
    """
    parts = []
    for chunk in finals.split(chunk_rows):
        best = whole.products(chunk).argmax(
            -1
        )  # scale and softcap keep the order, but could make ties
        share = whole.logits(chunk).softmax(-1)[:, inside].sum(-1)
        parts.append(share * inside[best])
    return torch.cat(parts) if parts else finals.new_zeros(0, dtype=torch.float32)
