# SPDX-License-Identifier: Apache-2.0
"""The target's output layer: from its last state before the final norm to logits.

Shapes: T tokens, C rows of a chunk, H hidden size, V target vocabulary, D draft vocabulary.
"""

import dataclasses
import threading

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from shared.target.tensors import FinalNorm, TargetTensors
from stages.train.kernels.precision import at_least_float32

# Of `SharesInVocab`: at 150,000 tokens they are 150 MiB of float32.
CHUNK_ROWS = 256


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

    @classmethod
    def of(
        cls, tensors: TargetTensors, accelerator: Accelerator, token_ids: Tensor | None = None
    ) -> "TargetOutput":
        """On the accelerator's device; in mixed precision with products in bf16, as where it is served.

        Args:
            token_ids: [D] the target's ids of the draft vocabulary; None for all tokens.
        """
        rows = tensors.lm_head
        if token_ids is not None:
            rows = rows[token_ids.to(rows.device)]
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        return cls(
            norm=tensors.norm.to(accelerator.device),
            lm_head=rows.to(accelerator.device, dtype),
            logit_scale=tensors.logit_scale,
            softcap=tensors.softcap,
        )

    def products(self, finals: Tensor) -> Tensor:
        """[C, H] states to [C, D] products with lm_head, in its dtype, without scale and softcap."""
        return F.linear(self.norm(finals).to(self.lm_head.dtype), self.lm_head)

    def logits(self, finals: Tensor) -> Tensor:
        """[C, H] states before the final norm to [C, D] logits, float32 or wider."""
        return self.scale_(at_least_float32(self.products(finals)))

    def scale_(self, products: Tensor) -> Tensor:
        """Products to logits, in place."""
        if self.logit_scale != 1:
            products.mul_(self.logit_scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products


class SharesInVocab:
    """The target's probability of all tokens of the draft vocabulary; 0 where its argmax is outside.

    It is made once for the data: `Batch.in_vocab`. Cost for each state: one product with lm_head
    [V, H]. All [CHUNK_ROWS, V] numbers live in buffers that every call fills anew: a process that
    keeps freed memory would find no room of their size between its small tensors, and grow.

    Worked example: p = [0.5, 0.3, 0.2]; with the first and the last token inside 0.7, with the last two 0.

    Args:
        whole: the target's output over its full vocabulary.
        inside: [V] bool, the tokens of the draft vocabulary.
    """

    def __init__(self, whole: TargetOutput, inside: Tensor) -> None:
        self._whole, self._inside = whole, inside
        self._token_ids = inside.nonzero().flatten()
        self._products = whole.lm_head.new_empty(CHUNK_ROWS, len(inside))
        self._logits = at_least_float32(self._products)  # the same tensor, unless that is bfloat16
        self._parts = self._logits.new_empty(CHUNK_ROWS, len(self._token_ids))
        self._lock = threading.Lock()  # several threads make batches

    def __call__(self, finals: Tensor) -> Tensor:
        """[C] float32 or wider, of states [C, H] before the final norm; C is at most CHUNK_ROWS."""
        with self._lock:
            products, logits, parts = (
                buffer[: len(finals)] for buffer in (self._products, self._logits, self._parts)
            )
            normed = self._whole.norm(finals.to(products.device)).to(products.dtype)
            torch.mm(normed, self._whole.lm_head.t(), out=products)
            best = products.argmax(-1)  # scale and softcap keep the order, but could make ties
            if logits.dtype != products.dtype:
                logits.copy_(products)
            torch.softmax(self._whole.scale_(logits), -1, out=logits)
            torch.index_select(logits, 1, self._token_ids, out=parts)
            return parts.sum(-1) * self._inside[best]
