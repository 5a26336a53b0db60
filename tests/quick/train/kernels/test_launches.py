# SPDX-License-Identifier: Apache-2.0
"""A training step on an accelerator, on meta tensors: what it launches, and that it never waits.

The Triton kernels are operators with a number of launches of their own; views launch nothing.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shared.contracts.head_config import HeadConfig
from shared.contracts.head_variant import named_variant
from shared.target.tensors import FinalNorm
from stages.train.data.batch import Batch
from stages.train.model import DraftHead
from stages.train.objective.loss import ttt_loss
from stages.train.objective.target_output import TargetOutput

LLAMA_1B = HeadConfig(
    hidden_size=2048,
    target_hidden_size=2048,
    intermediate_size=8192,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128256,
    draft_vocab_size=32000,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    max_position_embeddings=131072,
    aux_layers=(2, 8, 13),
)
PROMPT_TOKENS = 64
FREE = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze"}
FREE |= {"slice", "select", "split", "split_with_sizes", "detach", "alias", "unbind", "as_strided"}
FREE |= {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_to_copy_meta"}
LAUNCHES = {"attention": 1, "attention_backward": 10, "loss_rows": 1}
WAITS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "masked_select", "equal"}


class Counter(TorchDispatchMode):
    """Counts launches; an operator whose result the host needs is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        indexes = [x for x in (args[1] if name in ("index", "index_put_") else []) if x is not None]
        waits = name in WAITS or any(x.dtype == torch.bool for x in indexes)
        assert not waits, f"the host waits for {func}"
        device = (kwargs or {}).get("device")
        assert device is None or torch.device(device).type == "meta", (
            f"{func} makes {device} tensors"
        )
        self.launches += 0 if name in FREE else LAUNCHES.get(name, 1)
        return func(*args, **(kwargs or {}))


EAGLE_3_1 = dataclasses.replace(LLAMA_1B, variant=named_variant())
P_EAGLE = dataclasses.replace(
    LLAMA_1B, variant=named_variant("eagle3.1", parallel=True), mask_token=128255
)


def step_on_meta(documents: int, tokens: int, num_steps: int, config: HeadConfig = LLAMA_1B) -> int:
    """Launches of forward, loss and backward of one batch that is on the device.

    In float32, since meta tensors have no autocast; its casts are about 100 launches more.
    """
    total = documents * tokens
    mask = (torch.arange(total) % tokens) >= PROMPT_TOKENS
    with torch.device("meta"):
        states = torch.empty(total, 4, 2048, dtype=torch.bfloat16)
        embeddings = torch.empty(128256, 2048, dtype=torch.bfloat16)
        head = DraftHead(config, embed_tokens=embeddings, d2t=torch.empty(32000).long())
        target = TargetOutput(
            FinalNorm(torch.empty(2048), 1e-5), torch.empty(32000, 2048).bfloat16()
        )
    batch = Batch(
        input_ids=torch.zeros(total, dtype=torch.int64),
        loss_mask=mask,
        aux_states=states[:, :3].flatten(1),
        final_states=states[:, 3].contiguous(),
        offsets=torch.arange(documents + 1) * tokens,
        in_vocab=torch.ones(total, dtype=torch.bool),
        sample_ids=(),
    )
    batch = batch.planned(num_steps, blocks=False).to(torch.device("meta"))
    with Counter() as counter:
        loss, _ = ttt_loss(head, batch, target, num_steps=num_steps, decay=0.9)
        loss.backward()
    return counter.launches


@pytest.mark.parametrize(("documents", "tokens", "num_steps"), [(16, 2048, 3), (54, 300, 4)])
def test_a_step_never_waits_and_launches_little(
    documents: int, tokens: int, num_steps: int
) -> None:
    assert (
        100 < step_on_meta(documents, tokens, num_steps) <= 1300
    )  # 200 for casts, clipping and AdamW


def test_a_parallel_head_launches_less() -> None:
    """Its later steps project one row, and look up no token."""
    assert 100 < step_on_meta(4, 300, 4, P_EAGLE) < step_on_meta(4, 300, 4, EAGLE_3_1)


def test_a_wait_would_be_seen() -> None:
    with pytest.raises(AssertionError, match="waits"), Counter():
        torch.ones(3, device="meta").nonzero()
