# SPDX-License-Identifier: Apache-2.0
"""How much memory a head's training takes."""

import pytest
import torch

from stages.ops.chain import sizes
from stages.train.loop.optimizer import make_optimizer
from stages.train.model import DraftHead
from tests.quick.train.export.small_head import CONFIG


@pytest.mark.parametrize(("name", "muon"), [("adamw", None), ("muon", torch.float32)])
def test_the_training_state_is_what_a_head_and_its_optimizer_hold(
    name: str, muon: torch.dtype | None
) -> None:
    embeddings = torch.zeros(CONFIG.vocab_size, CONFIG.hidden_size).bfloat16()
    vocabulary = torch.zeros(CONFIG.draft_vocab_size, dtype=torch.int64)
    head = DraftHead(CONFIG, embed_tokens=embeddings, d2t=vocabulary)
    optimizer = make_optimizer(head, learning_rate=1e-3, muon=muon)
    sum(weight.sum() for weight in head.parameters()).backward()
    optimizer.step()
    held = [
        head.embed_tokens,
        head.lm_head.weight.bfloat16(),
    ]  # the latter in place of the target's
    for weight in head.parameters():
        moments = [x for x in optimizer.state[weight].values() if x.dim()]
        held += [weight, weight.grad, *moments]
    assert sizes.train_bytes(CONFIG, name) == sum(x.nbytes for x in held)
