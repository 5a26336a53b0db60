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


def target_argmax(
    finals: Tensor, *, norm: FinalNorm, lm_head: Tensor, chunk_rows: int = 256
) -> Tensor:
    """[T] int64: the target's most likely next token over its full vocabulary, at each token.

    A positive scale and a softcap keep the order, so neither is needed. It gives
    `in_vocab = t2d[target_argmax(...)]`, which is made once for the data.
    """
    parts = [
        F.linear(norm(chunk).to(lm_head.dtype), lm_head).argmax(-1)
        for chunk in finals.split(chunk_rows)
    ]
    return torch.cat(parts) if parts else finals.new_zeros(0, dtype=torch.int64)
