# SPDX-License-Identifier: Apache-2.0
"""The draft head's mathematics again, plainly: what every fast path is held to.

One document, one slot, one step at a time; full matrices, Python loops, no packing, no chunks, no
cleverness, float64 unless told otherwise. Written from the definitions, sharing no code with the
stage. Slow on purpose: a hundred tokens take seconds.

Shapes: S tokens of a document, A aux layers, H hidden size, V target and D draft vocabulary.
"""

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the reference needs to know of a head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    eps: float
    norms: frozenset[str] = frozenset()  # the flags of a HeadVariant that are set
    window: int | None = None  # positions that attention sees
    mask_token: int | None = None  # of a P-EAGLE head


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: tokens [S], states [S, A*H], finals [S, H], answer [S] bool."""

    tokens: Tensor
    states: Tensor
    finals: Tensor
    answer: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate_one(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotate one head's vector [d]: the pair (i, i + d/2) turns by position * theta^(-2i/d)."""
    half = len(x) // 2
    turned = []
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        turned.append(x[i] * math.cos(angle) - x[i + half] * math.sin(angle))
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        turned.append(x[i + half] * math.cos(angle) + x[i] * math.sin(angle))
    return torch.stack(turned)


def project(
    weights: dict[str, Tensor], shape: Shape, name: str, x: Tensor, position: int
) -> Tensor:
    """[2H] through q_proj, k_proj or v_proj to [heads, d]; q and k are rotated."""
    heads = (weights[f"midlayer.self_attn.{name}.weight"] @ x).view(-1, shape.head_dim)
    if name == "v_proj":
        return heads
    if "qk_norm" in shape.norms:
        scale = weights[f"midlayer.self_attn.{name[0]}_norm.weight"]
        heads = torch.stack([rms_norm(head, scale, shape.eps) for head in heads])
    return torch.stack([rotate_one(head, position, shape.rope_theta) for head in heads])


def from_aux(weights: dict[str, Tensor], shape: Shape, states: Tensor) -> Tensor:
    """One token's aux states [A*H] through the norms that there are, and fc; [H]."""
    if "norm_before_fc" in shape.norms:
        states = rms_norm(states, weights["input_norm.weight"], shape.eps)
    if "fc_norm" in shape.norms:
        scales = [weights[name] for name in sorted(weights) if name.startswith("fc_norm.")]
        parts = states.view(len(scales), -1)
        states = torch.cat([rms_norm(x, s, shape.eps) for x, s in zip(parts, scales, strict=True)])
    return weights["fc.weight"] @ states


def layer_input(
    weights: dict[str, Tensor], shape: Shape, embedding: Tensor, state: Tensor
) -> Tensor:
    """[norm(embedding), norm(state)], [2H]."""
    return torch.cat(
        [
            rms_norm(embedding, weights["midlayer.input_layernorm.weight"], shape.eps),
            rms_norm(state, weights["midlayer.hidden_norm.weight"], shape.eps),
        ]
    )


def layer_output(
    weights: dict[str, Tensor],
    shape: Shape,
    state: Tensor,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
) -> Tensor:
    """One slot through attention over the listed keys, and the MLP; [H], before the final norm."""
    per_head = []
    for head in range(shape.num_heads):
        shared = head // (shape.num_heads // shape.num_kv_heads)
        scores = torch.stack([query[head] @ key[shared] for key in keys]) / shape.head_dim**0.5
        shares = torch.softmax(scores, 0)
        per_head.append(sum(s * value[shared] for s, value in zip(shares, values, strict=True)))
    if "norm_before_residual" in shape.norms:
        state = rms_norm(state, weights["midlayer.hidden_norm.weight"], shape.eps)
    state = state + weights["midlayer.self_attn.o_proj.weight"] @ torch.cat(per_head)
    normed = rms_norm(state, weights["midlayer.post_attention_layernorm.weight"], shape.eps)
    gate = weights["midlayer.mlp.gate_proj.weight"] @ normed
    up = weights["midlayer.mlp.up_proj.weight"] @ normed
    return state + weights["midlayer.mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)


def chain(
    weights: dict[str, Tensor],
    shape: Shape,
    embed: Tensor,
    document: Document,
    slot: int,
    num_steps: int,
) -> list[Tensor]:
    """The pre-norm outputs [H] of one slot's chain, as long as its next tokens exist.

    With `norm_output` the next step is fed what the final norm makes of them. A `parallel` head is fed
    the same mask at each step after the first, so its tokens do not matter.
    """
    keys, values, outputs, positions = [], [], [], []
    for t in range(slot + 1):  # step-0 keys of this slot and of those before it
        state = from_aux(weights, shape, document.states[t])
        x = layer_input(weights, shape, embed[document.tokens[t + 1]], state)
        keys.append(project(weights, shape, "k_proj", x, t))
        values.append(project(weights, shape, "v_proj", x, t))
        positions.append(t)
    for step in range(num_steps):
        if slot + 1 + step >= len(document.tokens):
            break
        state = outputs[-1] if step else from_aux(weights, shape, document.states[slot])
        if step and "norm_output" in shape.norms:
            state = rms_norm(state, weights["norm.weight"], shape.eps)
        token = document.tokens[slot + 1 + step]
        if step and "parallel" in shape.norms:
            state, token = (
                from_aux(weights, shape, weights["mask_hidden"].view(-1)),
                shape.mask_token,
            )
        x = layer_input(weights, shape, embed[token], state)
        if step:
            keys.append(project(weights, shape, "k_proj", x, slot + step))
            values.append(project(weights, shape, "v_proj", x, slot + step))
            positions.append(slot + step)
        query = project(weights, shape, "q_proj", x, slot + step)
        first = slot + step + 1 - (shape.window or len(document.tokens))
        seen = [i for i, position in enumerate(positions) if position >= first]
        own_keys, own_values = [keys[i] for i in seen], [values[i] for i in seen]
        outputs.append(layer_output(weights, shape, state, query, own_keys, own_values))
    return outputs


def logits(weights: dict[str, Tensor], shape: Shape, hidden: Tensor) -> Tensor:
    """[H] to the draft's logits [D]."""
    return weights["lm_head.weight"] @ rms_norm(hidden, weights["norm.weight"], shape.eps)


def slot_loss(given: Tensor, z: Tensor, loss: str) -> Tensor:
    """One slot's loss, of the target's probabilities of the draft vocabulary [D] and the head's logits z [D].

    `given` adds up to less than 1 where the target may say something else, which is never accepted;
    cross-entropy renormalises it. Acceptance at temperature 1 is sum_v min(given_v, q_v), and LK's hybrid
    blends with exp(-3 of it).
    """
    p = given / given.sum()
    entropy = -(p * torch.log_softmax(z, 0)).sum()
    accepted = torch.minimum(given, torch.softmax(z, 0)).sum()
    mix = math.exp(-3 * accepted.item())
    return {
        "cross_entropy": entropy,
        "lk": -torch.log(accepted),
        "tv": 1 - accepted,
        "lk_hybrid": mix * entropy + (1 - mix) * (1 - accepted),
    }[loss]


def counts(document: Document, slot: int, step: int) -> bool:
    """Whether tokens slot+1 .. slot+2+step exist and are all answer."""
    needed = range(slot + 1, slot + 3 + step)
    return needed[-1] < len(document.tokens) and all(bool(document.answer[i]) for i in needed)


def ttt_loss(
    weights: dict[str, Tensor],
    shape: Shape,
    embed: Tensor,
    documents: list[Document],
    target: dict[str, Tensor],
    token_ids: Tensor,
    *,
    num_steps: int,
    decay: float,
    loss: str = "cross_entropy",
    scale: float = 1.0,
    softcap: float | None = None,
) -> dict[str, object]:
    """Loss (differentiable) and, for each step, mean loss, counts and hits, over whole documents.

    Args:
        target: norm [H] and lm_head [V, H] of the target.
        token_ids: [D] the target id of each draft id.
    """
    losses: list[list[Tensor]] = [[] for _ in range(num_steps)]
    counted, hits = [0] * num_steps, [0] * num_steps
    for document in documents:
        for slot in range(len(document.tokens) - 1):
            outputs = chain(weights, shape, embed, document, slot, num_steps)
            for step, hidden in enumerate(outputs):
                if not counts(document, slot, step):
                    continue
                counted[step] += 1
                final = rms_norm(document.finals[slot + 1 + step], target["norm"], shape.eps)
                full = scale * (target["lm_head"] @ final)  # [V]
                if softcap is not None:
                    full = softcap * torch.tanh(full / softcap)
                if int(full.argmax()) not in token_ids.tolist():
                    continue
                given = torch.softmax(full, 0)[token_ids]
                z = logits(weights, shape, hidden)
                losses[step].append(slot_loss(given, z, loss))
                hits[step] += int(token_ids[int(z.argmax())]) == int(full.argmax())
    means = [torch.stack(step).mean() if step else None for step in losses]
    step_weight = [decay**k if mean is not None else 0.0 for k, mean in enumerate(means)]
    total = sum(w * m for w, m in zip(step_weight, means, strict=True) if m is not None)
    return {
        "loss": total / sum(step_weight),
        "means": means,
        "in_vocab_slots": [len(step) for step in losses],
        "counted": counted,
        "hits": hits,
    }


def engine_walk(hits: list[list[bool]], first_slot: int, num_scored: int) -> list[int]:
    """Accepted tokens of each draft, as a served request would see them.

    The prompt's pass emits token P (slot P - 1 = `first_slot`). Then, until `num_scored` tokens are
    out: draft, accept up to the first miss, emit what was accepted and one token of the target's.
    """
    accepted = []
    emitted = 1
    while emitted < num_scored:
        last_emitted = first_slot + emitted  # P - 1 + emitted
        run = 0
        for hit in hits[last_emitted - 1]:  # the slot before the last emitted token
            if not hit:
                break
            run += 1
        accepted.append(run)
        emitted += run + 1
    return accepted
