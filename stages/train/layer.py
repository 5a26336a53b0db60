# SPDX-License-Identifier: Apache-2.0
"""The one decoder layer of a draft head: its modules, named as the exported file's tensors are.

Shapes: R requested slots, H hidden size, Hq / Hkv query / key heads, d head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.contracts.head_config import HeadConfig
from stages.train.kernels.norm import RMSNorm


class Attention(nn.Module):
    """The projections; q, k and v read [norm(embedding), norm(state)], hence 2H inputs."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        size, head_dim = config.hidden_size, config.head_dim
        self.widths = [config.num_attention_heads * head_dim] + 2 * [
            config.num_key_value_heads * head_dim
        ]
        self.q_proj = nn.Linear(2 * size, self.widths[0], bias=False)
        self.k_proj = nn.Linear(2 * size, self.widths[1], bias=False)
        self.v_proj = nn.Linear(2 * size, self.widths[2], bias=False)
        self.o_proj = nn.Linear(self.widths[0], size, bias=False)
        if config.variant.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

    def halves(self) -> tuple[Tensor, Tensor]:
        """The stacked q, k and v weights, split into the half for embeddings and that for states.

        Each is [(Hq + 2 Hkv) d, H]. The embedding half is projected once for all steps, since a
        later step sees the same embeddings shifted.
        """
        stacked = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        embedding_half, state_half = stacked.chunk(2, dim=1)
        return embedding_half, state_half


class MLP(nn.Module):
    """Gated SiLU, as in Llama."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """The one decoder layer; the residual is the state before `hidden_norm`."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = MLP(config)

    def after_attention(self, residual: Tensor, attended: Tensor) -> Tensor:
        """[R, H] residual and [R, Hq, d] attention output to the step's pre-norm output [R, H]."""
        residual = residual + self.self_attn.o_proj(attended.flatten(1))
        return residual + self.mlp(self.post_attention_layernorm(residual))
