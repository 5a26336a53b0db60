# SPDX-License-Identifier: Apache-2.0
"""A small head of random weights, and its export."""

import json
from pathlib import Path
from typing import Any

import torch

from shared.contracts.head_config import HeadConfig
from stages.train.export.hf import export_head
from stages.train.model import DraftHead

CONFIG = HeadConfig(
    hidden_size=16,
    target_hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=30,
    draft_vocab_size=12,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    max_position_embeddings=256,
    aux_layers=(2, 4, 5),
)


def make_head(config: HeadConfig = CONFIG) -> DraftHead:
    torch.manual_seed(0)
    partial = config.draft_vocab_size < config.vocab_size
    d2t = torch.arange(config.draft_vocab_size) + 3 if partial else None  # ids 3, 5, 7, ...
    return DraftHead(config, embed_tokens=torch.randn(config.vocab_size, 16), d2t=d2t)


def export(head: DraftHead, out: Path, *, dtype: str = "float32", **more: Any) -> dict[str, Any]:
    export_head(head, out, target="models/small", provenance={"steps": 7}, dtype=dtype, **more)
    return json.loads((out / "config.json").read_text())
