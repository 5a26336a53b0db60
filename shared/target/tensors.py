# SPDX-License-Identifier: Apache-2.0
"""The weights between a target's hidden states and its tokens, and the arithmetic on them.

Legend: n states, H hidden size, V vocabulary.
"""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.io import safetensors_files
from shared.target.adapter import output_layer
from shared.target.model import TargetConfig

# Rows of lm_head that are held as float32 at once.
_HEAD_ROWS = 16384


@dataclasses.dataclass(frozen=True)
class FinalNorm:
    """The target's final norm, RMSNorm or LayerNorm.

    Attributes:
        weight: [H] the factor in effect: 1 + w for Gemma's kind.
        bias: [H], or None.
        is_centered: whether the mean is subtracted, as LayerNorm does.
    """

    weight: Tensor
    eps: float
    bias: Tensor | None = None
    is_centered: bool = False

    def __call__(self, states: Tensor) -> Tensor:
        """States [..., H] normed, in float32, or in float64 if they are."""
        exact = torch.promote_types(states.dtype, torch.float32)
        states, weight = states.to(exact), self.weight.to(exact)
        if not self.is_centered:
            normed = F.rms_norm(states, weight.shape, weight, self.eps)
            return normed if self.bias is None else normed + self.bias.to(exact)
        bias = None if self.bias is None else self.bias.to(exact)
        return F.layer_norm(states, weight.shape, weight, bias, self.eps)

    def to(self, device: torch.device) -> "FinalNorm":
        """The same norm in float32 on `device`."""
        bias = None if self.bias is None else self.bias.to(device).float()
        return dataclasses.replace(self, weight=self.weight.to(device).float(), bias=bias)

    def unscaled(self, normed: Tensor) -> Tensor:
        """Normed states [n, H] without weight and bias: their mean square is 1."""
        shifted = normed.float() if self.bias is None else normed.float() - self.bias.float()
        return shifted / self.weight.float()


@dataclasses.dataclass(frozen=True)
class TargetTensors:
    """The target's embedding and output layer.

    Attributes:
        embed_tokens, lm_head: [V, H], one tensor where they are tied.
        logit_scale, softcap: logits = c * tanh(s * lm_head(y) / c), or s * lm_head(y) where c is None.
    """

    embed_tokens: Tensor
    norm: FinalNorm
    lm_head: Tensor
    logit_scale: float = 1.0
    softcap: float | None = None

    def head_logits(self, normed: Tensor) -> Tensor:
        """Logits [n, V] of normed states [n, H], in float32."""
        parts = [normed.float() @ rows.float().T for rows in self.lm_head.split(_HEAD_ROWS)]
        values = torch.cat(parts, dim=-1) * self.logit_scale
        return values if self.softcap is None else self.softcap * torch.tanh(values / self.softcap)

    def logits(self, final: Tensor) -> Tensor:
        """Logits [n, V] of final states [n, H] before the norm, in float32."""
        return self.head_logits(self.norm(final))


def read_tensors(target: TargetConfig) -> TargetTensors:
    """Read them from the target's safetensors files.

    Raises:
        UserError: as `adapter.output_layer`; or a file is missing or damaged.
    """
    layer = output_layer(target, safetensors_files.list_tensors(target.folder))
    read = functools.partial(safetensors_files.read_tensor, target.folder)
    embedding = read(layer.embedding)
    weight = torch.ones(target.hidden_size)
    if layer.norm_weight is not None:
        weight = read(layer.norm_weight)
        if layer.norm.offset:
            weight = weight.float() + layer.norm.offset
    norm = FinalNorm(
        weight,
        layer.norm.eps,
        None if layer.norm_bias is None else read(layer.norm_bias),
        layer.norm.is_centered,
    )
    lm_head = embedding if layer.lm_head == layer.embedding else read(layer.lm_head)
    return TargetTensors(embedding, norm, lm_head, layer.logit_scale, layer.softcap)
