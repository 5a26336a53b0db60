# SPDX-License-Identifier: Apache-2.0
"""One training problem for every side of the benchmark: shapes, weights, packed documents, its floor.

It imports torch alone, so that it loads in an environment that holds another trainer.
Shapes: T tokens, A aux layers, H hidden size, V target and D draft vocabulary, K TTT steps.
"""

import dataclasses

import torch
from torch import Tensor

NUM_AUX = 3
NUM_TURNS = 4
DECAY = 0.8
EPS = 1e-5
ROPE_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class Shape:
    """A draft head and the documents it is trained on, all of one length."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    draft_vocab: int
    tokens: int
    ttt_steps: int
    head_dim: int = 64
    documents: int = 1

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def document_tokens(self) -> int:
        return self.tokens // self.documents


SHAPES = {
    "S0": Shape(64, 96, 2, 1, 300, 120, 128, 3, head_dim=32),  # a smoke test of the benchmark
    "S0-chat": Shape(64, 96, 2, 1, 300, 120, 128, 4, head_dim=32, documents=4),
    "S1": Shape(512, 1408, 8, 4, 32000, 8000, 1024, 3),
    "S2": Shape(512, 1408, 8, 4, 32000, 8000, 2048, 7),
    "S3": Shape(1024, 2816, 16, 4, 128256, 32000, 1024, 3),
    # For a card: the head of Llama-3.2-1B over long documents, and over a chat's.
    "1B": Shape(2048, 8192, 32, 8, 128256, 32000, 16 * 2048, 3, documents=16),
    "1B-chat": Shape(2048, 8192, 32, 8, 128256, 32000, 54 * 300, 4, documents=54),
}


def weights(shape: Shape) -> dict[str, Tensor]:
    """Every tensor of the head by its exported name, and the target's; equal in each process."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    hidden, inner = shape.hidden, shape.inner
    norms = ("midlayer.input_layernorm", "midlayer.hidden_norm", "norm")
    made = {
        f"{name}.weight": 1 + 0.1 * torch.randn(hidden, generator=generator)
        for name in (*norms, "midlayer.post_attention_layernorm")
    }
    step = shape.vocab // shape.draft_vocab
    return made | {
        "fc.weight": matrix(hidden, NUM_AUX * hidden),
        "midlayer.self_attn.q_proj.weight": matrix(shape.queries, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": matrix(shape.keys, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": matrix(shape.keys, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": matrix(hidden, shape.queries),
        "midlayer.mlp.gate_proj.weight": matrix(inner, hidden),
        "midlayer.mlp.up_proj.weight": matrix(inner, hidden),
        "midlayer.mlp.down_proj.weight": matrix(hidden, inner),
        "lm_head.weight": matrix(shape.draft_vocab, hidden),
        "target.embed_tokens": torch.randn(shape.vocab, hidden, generator=generator) * 0.3,
        "target.lm_head": matrix(shape.draft_vocab, hidden) * 2,  # its rows of the draft vocabulary
        "target.norm": 1 + 0.1 * torch.randn(hidden, generator=generator),
        "d2t": torch.arange(shape.draft_vocab) * (step - 1),  # the ids 0, step, 2 step, ...
    }


@dataclasses.dataclass(frozen=True)
class Row:
    """Documents of several turns; the target's argmax is always in the draft vocabulary.

    The first token of each is a prompt's where there are several, so no answer goes on into the next.
    """

    input_ids: Tensor  # [T] int64
    loss_mask: Tensor  # [T] bool
    aux_states: Tensor  # [T, A*H] bfloat16
    final_states: Tensor  # [T, H] bfloat16


def row(shape: Shape, share: float) -> Row:
    """A row in which about `share` of the slots count: turns of prompt, then answer."""
    generator = torch.Generator().manual_seed(1)
    turn = shape.document_tokens // NUM_TURNS
    place = torch.arange(shape.tokens) % shape.document_tokens
    is_answer = place % turn >= round((1 - share) * turn)
    return Row(
        input_ids=torch.randint(0, shape.vocab, (shape.tokens,), generator=generator),
        loss_mask=is_answer & ((place > 0) | (shape.documents == 1)),
        aux_states=torch.randn(
            shape.tokens, NUM_AUX * shape.hidden, generator=generator, dtype=torch.bfloat16
        ),
        final_states=torch.randn(
            shape.tokens, shape.hidden, generator=generator, dtype=torch.bfloat16
        ),
    )


def counted(loss_mask: Tensor, ttt_steps: int) -> Tensor:
    """[K, T] bool: tokens t+1 .. t+2+k are all answer, hence of one document."""
    answer = torch.cat((loss_mask, loss_mask.new_zeros(ttt_steps + 1)))
    rows = len(loss_mask)
    steps = [
        torch.stack([answer[i : i + rows] for i in range(1, k + 3)]).all(0)
        for k in range(ttt_steps)
    ]
    return torch.stack(steps)


def necessary_flops(shape: Shape, loss_mask: Tensor) -> int:
    """Matrix products that no exact step can do without, forward and backward, in FLOP.

    A product of [n, a] with [a, b] costs 2nab, and each of its two gradients as much. The inputs
    of `fc` and the target's states need no gradient. Attention's products: `attention_flops`.
    """
    gate = counted(loss_mask, shape.ttt_steps)
    slots = int(gate[0].sum())  # [R] run step 0; step k runs those that count at k
    runs = int(gate.sum())
    wide = shape.queries + 2 * shape.keys
    hidden, tokens = shape.hidden, shape.tokens
    fc = 4 * tokens * NUM_AUX * hidden**2
    keys_0 = 6 * tokens * hidden * 2 * shape.keys  # the state half of keys and values
    queries_0 = 6 * slots * hidden * shape.queries
    shifted = torch.stack([step.roll(k + 1) for k, step in enumerate(gate)])
    scored = int(shifted.any(0).sum())  # tokens that some counted slot reads and is scored at
    # the embedding half, once for all steps
    embeddings = 6 * hidden * (tokens * 2 * shape.keys + scored * shape.queries)
    later = 6 * (runs - slots) * hidden * wide
    layer = 6 * runs * (hidden * shape.queries + 3 * hidden * shape.inner)
    lm_head = 6 * runs * hidden * shape.draft_vocab
    target = 2 * scored * hidden * shape.draft_vocab
    return fc + keys_0 + queries_0 + embeddings + later + layer + lm_head + target


def attention_flops(shape: Shape, loss_mask: Tensor) -> int:
    """Attention's products, forward and backward, in FLOP: scores and sums over what a slot sees.

    Both cost 2d a pair of query and key, and each has two gradients of as much: 12d. Slot t of a
    document sees t + 1 keys of step 0, and at step k its own chain's k.
    """
    steps, slots = counted(loss_mask, shape.ttt_steps).nonzero().unbind(1)
    seen = slots % shape.document_tokens + 1 + steps
    return 12 * shape.head_dim * shape.heads * int(seen.sum())
