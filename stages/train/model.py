# SPDX-License-Identifier: Apache-2.0
"""The EAGLE-3 draft head and its training-time test (TTT) over packed documents.

In: token ids, the target's aux hidden states, where documents start, which slots to run.
Out: one pre-norm hidden state for each slot and TTT step; `draft_logits` turns them into logits.
Cost: keys and values for every slot once, everything else for the requested slots only; no
[T, T] tensor on a CPU, forward or backward.
The surprise: slot t holds the state of token t but the embedding of token t + 1, and predicts
token t + 2. Worked example, one document [x0 .. x5], slot 2:

    step  state fed in           embedding  rotary position  attends to (step-0 slots; own chain)
    0     fc(g2)                 x3         2                0 1 2
    1     own output of step 0   x4         3                0 1 2; step 1
    2     own output of step 1   x5         4                0 1 2; steps 1, 2

Shapes: T packed tokens, N documents, R requested slots, K TTT steps, A aux layers, H hidden size,
V target vocabulary, D draft vocabulary, Hq / Hkv query / key heads, d head size.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from shared.errors import UserError
from shared.files import read_json

INIT_STD = 0.02  # what transformers gives every linear layer of a Llama


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The shape of a draft head. The activation is SiLU and no layer has a bias: what engines load.

    `aux_layers` are in vLLM's numbering: id i is the state entering layer i of the target.
    """

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    aux_layers: tuple[int, ...]
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                "the draft head needs num_attention_heads to be a multiple of num_key_value_heads, "
                f"found {self.num_attention_heads} and {self.num_key_value_heads}."
            )
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise UserError(
                f"expected a draft vocabulary of 1 to {self.vocab_size} tokens (the target's), "
                f"found {self.draft_vocab_size}. Lower run.draft_vocab_size."
            )
        if self.hidden_size != self.target_hidden_size:
            raise UserError(
                "engines share the target's embeddings with the draft head, so its hidden size "
                f"must be the target's {self.target_hidden_size}, found {self.hidden_size}."
            )

    @classmethod
    def from_json(
        cls, raw: dict[str, Any], *, aux_layers: tuple[int, ...], draft_vocab_size: int
    ) -> "HeadConfig":
        """Shaped like the config.json in `raw`: a Llama-like target's, or an exported head's.

        Rotary parameters lie in `rope_parameters` (transformers 5) or in `rope_theta` and
        `rope_scaling` (transformers 4); both are read.

        Raises:
            UserError: a size is missing or not a number.
        """
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
        plain = rope.get("rope_type", rope.get("type", "default")) == "default"
        try:
            heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
            return cls(
                hidden_size=hidden,
                target_hidden_size=int(raw.get("target_hidden_size") or hidden),
                intermediate_size=int(raw["intermediate_size"]),
                num_attention_heads=heads,
                num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or hidden // heads),
                vocab_size=int(raw["vocab_size"]),
                draft_vocab_size=draft_vocab_size,
                rms_norm_eps=float(raw.get("rms_norm_eps") or 1e-6),
                rope_theta=float(theta),
                rope_scaling=None if plain else rope,
                max_position_embeddings=int(raw["max_position_embeddings"]),
                aux_layers=tuple(aux_layers),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"expected the sizes of a decoder in its config.json: {error!r}"
            ) from error


class Block(NamedTuple):
    """Query rows that attend to one range of step-0 keys: wholly, or causally as a square."""

    rows: slice
    keys: slice
    causal: bool


def attention_blocks(slots: Tensor, offsets: Tensor) -> list[Block]:
    """Cover "step-0 slots <= own slot, same document" with rectangles and causal squares.

    Worked example: one document of 8 tokens, slots [3, 4, 6] make two runs of neighbours.
    Run 3..4 is rows 0:2 with the square keys 3:5 and the rectangle keys 0:3; run 6 is row 2:3
    with the square keys 6:7 and the rectangle keys 0:6.

    Args:
        slots: [R] int64, ascending.
        offsets: [N+1] int64.
    """
    if not len(slots):
        return []
    documents = torch.bucketize(slots, offsets, right=True) - 1  # [R]
    breaks = (slots[1:] != slots[:-1] + 1) | (documents[1:] != documents[:-1])
    starts = [0, *(breaks.nonzero().flatten() + 1).tolist()]
    firsts = slots[starts].tolist()
    document_starts = offsets[documents[starts]].tolist()
    blocks = []
    for start, stop, first, document_start in zip(
        starts, [*starts[1:], len(slots)], firsts, document_starts, strict=True
    ):
        rows = slice(start, stop)
        blocks.append(Block(rows, slice(first, first + stop - start), causal=True))
        if document_start < first:
            blocks.append(Block(rows, slice(document_start, first), causal=False))
    return blocks


def _attend_cpu(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """One block: query [r, Hq, d], key [s, Hkv, d] to output [r, Hq, d], log-sum-exp [r, Hq]."""
    heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *heads_first, is_causal=causal
    )
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _attend_cpu_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block, given the output and log-sum-exp of the WHOLE attention row.

    With those two, exp(score - lse) is the block's share of the whole row's softmax, so blocks
    need no gradient of their own through the merge.
    """
    heads_first = (x.transpose(0, 1)[None] for x in (grad, query, key, value, out, lse))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads_first, 0.0, causal
    )
    grad_query, grad_key, grad_value = (x[0].transpose(0, 1) for x in grads)
    return grad_query, grad_key, grad_value


def _attend_anywhere(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """`_attend_cpu` in plain products, for other devices: the block's scores are stored."""
    scores = _block_scores(query, key, causal=causal)  # [Hkv, G, r, s]
    lse = scores.logsumexp(-1)
    out = torch.einsum("hgrs,shd->rhgd", (scores - lse[..., None]).exp(), value.float())
    return out.flatten(1, 2), lse.flatten(0, 1).t()


def _attend_anywhere_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_attend_cpu_backward` in plain products."""
    groups = (key.shape[1], -1)
    row_lse = lse.t().unflatten(0, groups)[..., None]  # [Hkv, G, r, 1]
    weights = (_block_scores(query, key, causal=causal) - row_lse).exp()
    grad, out = (x.float().unflatten(1, groups) for x in (grad, out))  # [r, Hkv, G, d]
    grad_scores = torch.einsum("rhgd,shd->hgrs", grad, value.float())
    grad_scores -= (grad * out).sum(-1).permute(1, 2, 0)[..., None]
    grad_scores *= weights * query.shape[-1] ** -0.5
    grad_query = torch.einsum("hgrs,shd->rhgd", grad_scores, key.float()).flatten(1, 2)
    grad_key = torch.einsum("hgrs,rhgd->shd", grad_scores, query.float().unflatten(1, groups))
    return grad_query, grad_key, torch.einsum("hgrs,rhgd->shd", weights, grad)


def _block_scores(query: Tensor, key: Tensor, *, causal: bool) -> Tensor:
    """Scaled scores [Hkv, G, r, s] in float32: for devices without the CPU's flash kernel."""
    grouped = query.unflatten(1, (key.shape[1], -1)).float()
    scores = torch.einsum("rhgd,shd->hgrs", grouped, key.float()) * query.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores.masked_fill_(later, -torch.inf)
    return scores


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Fold another part of the same softmax into `out` [r, Hq, d] and `lse` [r, Hq], in place."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp()[..., None]).add_(part * (part_lse - total).exp()[..., None])
    lse.copy_(total)


class ChainAttention(torch.autograd.Function):
    """Softmax attention over step-0 keys (blocks) and the slot's own chain (diagonals).

    A slot's chain contributes one key a step, so its scores are elementwise products; they join
    the blocks by log-sum-exp. `apply(query, key, value, blocks, key_1, value_1, key_2, ...)` with
    query [R, Hq, d], key and value [T, Hkv, d], chain members [R, Hkv, d] gives [R, Hq, d].
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[Block], *chain: Tensor
    ) -> Tensor:
        precision = torch.promote_types(query.dtype, torch.float32)
        out = query.new_zeros(query.shape, dtype=precision)
        lse = query.new_full(query.shape[:2], -torch.inf, dtype=precision)
        attend = _attend_cpu if query.is_cpu else _attend_anywhere
        with torch.autocast(query.device.type, enabled=False):
            for rows, keys, causal in blocks:
                part = attend(query[rows], key[keys], value[keys], causal=causal)
                _merge(out[rows], lse[rows], *part)
        groups = query.shape[1] // key.shape[1]
        for chain_key, chain_value in zip(chain[::2], chain[1::2], strict=True):
            score = _chain_score(query, chain_key)
            _merge(out, lse, chain_value.repeat_interleave(groups, dim=1), score)
        out = out.to(query.dtype)
        ctx.blocks = blocks
        ctx.save_for_backward(query, key, value, out, lse, *chain)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *chain = ctx.saved_tensors
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value)]
        grad_query = grads[0]
        attend_backward = _attend_cpu_backward if query.is_cpu else _attend_anywhere_backward
        for rows, keys, causal in ctx.blocks:
            block_grads = attend_backward(
                grad[rows], query[rows], key[keys], value[keys], out[rows], lse[rows], causal=causal
            )
            for total, where, part in zip(grads, (rows, keys, keys), block_grads, strict=True):
                total[where] += part
        groups = (key.shape[1], -1)
        grouped_grad, grouped_query = grad.unflatten(1, groups), query.unflatten(1, groups)
        delta = (grad * out).sum(-1, dtype=lse.dtype)  # [R, Hq]
        chain_grads = []
        for chain_key, chain_value in zip(chain[::2], chain[1::2], strict=True):
            weight = (_chain_score(query, chain_key) - lse).exp()  # [R, Hq]
            grad_score = _pair(grouped_grad, chain_value) - delta
            grad_score *= weight * query.shape[-1] ** -0.5
            weight, grad_score = (x.unflatten(1, groups)[..., None] for x in (weight, grad_score))
            grad_query.unflatten(1, groups).add_(grad_score * chain_key[:, :, None])
            chain_grads += [(grad_score * grouped_query).sum(2), (weight * grouped_grad).sum(2)]
        returned = (*grads, None, *chain_grads)
        return tuple(None if x is None else x.to(query.dtype) for x in returned)


def _pair(grouped: Tensor, member: Tensor) -> Tensor:
    """Dot products [R, Hq] of grouped [R, Hkv, G, d] with member [R, Hkv, d]."""
    precision = torch.promote_types(grouped.dtype, torch.float32)
    return (grouped * member[:, :, None]).sum(-1, dtype=precision).flatten(1)


def _chain_score(query: Tensor, chain_key: Tensor) -> Tensor:
    """Scaled scores [R, Hq] of each slot's query against its own chain's key."""
    return _pair(query.unflatten(1, (chain_key.shape[1], -1)), chain_key) * query.shape[-1] ** -0.5


class Rotary:
    """transformers' rotary embedding with the config's scaling variant.

    Not a module of the head, so that `head.to(torch.bfloat16)` leaves its frequencies in float32.
    """

    def __init__(self, config: HeadConfig) -> None:
        self._embedding = LlamaRotaryEmbedding(
            LlamaConfig(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_attention_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rope_theta=config.rope_theta,
                rope_scaling=dict(config.rope_scaling) if config.rope_scaling else None,
            )
        )

    def table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each [n, 1, d], for positions [n]."""
        self._embedding.to(positions.device)
        like = torch.empty(
            0, device=positions.device, dtype=torch.promote_types(dtype, torch.float32)
        )
        cos, sin = self._embedding(like, positions[None])
        return cos[0, :, None].to(dtype), sin[0, :, None].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [n, heads, d] by cos and sin [n, 1, d]; halves, not interleaved pairs."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight in the input's dtype: in mixed precision only that is fused."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


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

    def halves(self) -> tuple[Tensor, Tensor]:
        """The stacked q, k, v weights as the half for embeddings and the half for states.

        Each [(Hq + 2 Hkv) d, H]. The embedding half of a token is the same at every step, so it
        is projected once and only shifted.
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


class DraftHead(nn.Module):
    """A classic EAGLE-3 head; its `state_dict` has exactly the keys of the exported file.

    Args:
        embed_tokens: [V, H] the target's embeddings: frozen, shared, never saved with the head.
        d2t: [D] int64 offsets, `target_id = draft_id + d2t[draft_id]`; None where D = V.
        lm_head: [D, H] the target's rows to start from; None starts at random.
    """

    embed_tokens: Tensor
    d2t: Tensor
    t2d: Tensor

    def __init__(
        self,
        config: HeadConfig,
        *,
        embed_tokens: Tensor,
        d2t: Tensor | None = None,
        lm_head: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.rotary = Rotary(config)
        num_inputs = len(config.aux_layers) * config.target_hidden_size
        self.fc = nn.Linear(num_inputs, config.hidden_size, bias=False)
        self.midlayer = DraftLayer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
        if lm_head is not None:
            with torch.no_grad():
                self.lm_head.weight.copy_(lm_head)
        self._set_buffers(embed_tokens, d2t)

    def _set_buffers(self, embed_tokens: Tensor, d2t: Tensor | None) -> None:
        config = self.config
        expected = (config.vocab_size, config.hidden_size)
        if tuple(embed_tokens.shape) != expected:
            raise UserError(
                f"the target's embeddings must be {list(expected)} for this draft head, "
                f"found {list(embed_tokens.shape)}."
            )
        self.register_buffer("embed_tokens", embed_tokens.detach(), persistent=False)
        if (d2t is None) != (config.draft_vocab_size == config.vocab_size):
            raise UserError("a draft vocabulary (d2t) is needed exactly where D < V.")
        if d2t is not None:
            t2d = torch.zeros(config.vocab_size, dtype=torch.bool, device=d2t.device)
            t2d[d2t + torch.arange(len(d2t), device=d2t.device)] = True
            self.register_buffer("d2t", d2t.detach().clone())
            self.register_buffer("t2d", t2d)

    def forward(
        self, tokens: Tensor, states: Tensor, *, offsets: Tensor, slots: Tensor, num_steps: int
    ) -> list[Tensor]:
        """The pre-norm output [R, H] of the requested slots at each of `num_steps` TTT steps.

        Args:
            tokens: [T] int64; tokens past the last state may follow, of the last document.
            states: [T, A*H].
            offsets: [N+1] int64, where documents start and the last one ends.
            slots: [R] int64, ascending. Where t + 1 + k lies outside the slot's document, the
                output is meaningless: the caller masks it.
        """
        layer = self.midlayer
        blocks = attention_blocks(slots, offsets)
        rows = torch.arange(len(states), device=tokens.device)
        documents = torch.bucketize(rows, offsets, right=True) - 1
        positions = rows - offsets[documents]
        embedding_half, state_half = layer.self_attn.halves()
        embeddings = F.embedding(tokens, self.embed_tokens).to(self.fc.weight.dtype)
        by_token = F.linear(layer.input_layernorm(embeddings), embedding_half)
        residual = self.fc(states.to(self.fc.weight.dtype))  # [T, H]
        outputs: list[Tensor] = []
        step_0: tuple[Tensor, ...] = ()
        chain: list[Tensor] = []
        for step in range(num_steps):
            inputs = (rows + 1 + step).clamp(max=len(tokens) - 1)
            # index_select: its backward is far cheaper than that of indexing with brackets
            projected = F.linear(layer.hidden_norm(residual), state_half)
            projected = projected + by_token.index_select(0, inputs)
            query, key, value = self._heads(projected, positions + step)
            if step == 0:
                # Every slot is a key at step 0; from here on only the requested slots run.
                step_0 = (key, value)
                query, residual = query.index_select(0, slots), residual.index_select(0, slots)
                rows, positions = slots, positions[slots]
            else:
                chain += [key, value]
            attended = ChainAttention.apply(query, *step_0, blocks, *chain)
            residual = layer.after_attention(residual, attended)
            outputs.append(residual)
        return outputs

    def _heads(self, projected: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, (Hq + 2 Hkv) d] to rotated query [n, Hq, d], rotated key and value [n, Hkv, d]."""
        head_dim = self.config.head_dim
        query, key, value = (
            part.unflatten(1, (-1, head_dim))
            for part in projected.split(self.midlayer.self_attn.widths, dim=1)
        )
        cos, sin = self.rotary.table(positions, projected.dtype)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def draft_logits(
        self,
        tokens: Tensor,
        states: Tensor,
        *,
        num_steps: int,
        slots: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced logits [K, R, D] over draft ids; row (k, t) proposes token t + 2 + k.

        `slots` defaults to every slot, `offsets` to one document. Give tokens [T + num_steps] to
        have every chain fed: with shorter ones, the last token stands in for those that lack.
        """
        if offsets is None:
            offsets = torch.tensor([0, len(states)], device=tokens.device)
        if slots is None:
            slots = torch.arange(len(states), device=tokens.device)
        hidden = self(tokens, states, offsets=offsets, slots=slots, num_steps=num_steps)
        return self.lm_head(self.norm(torch.stack(hidden)))

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """Draft ids to the target's ids, any shape."""
        if self.config.draft_vocab_size == self.config.vocab_size:
            return draft_ids
        return draft_ids + self.d2t[draft_ids]


def load_head(folder: Path, embed_tokens: Tensor) -> DraftHead:
    """The head of an exported folder: the folder's dtype, the device of `embed_tokens` [V, H].

    Raises:
        UserError: the folder does not hold a head of this kind.
    """
    raw = read_json(folder / "config.json")
    try:
        weights = load_file(folder / "model.safetensors")
        config = HeadConfig.from_json(
            raw,
            aux_layers=tuple(raw["eagle_aux_hidden_state_layer_ids"]),
            draft_vocab_size=int(raw["draft_vocab_size"]),
        )
        head = DraftHead(config, embed_tokens=embed_tokens, d2t=weights.get("d2t"))
        head.to(device=embed_tokens.device, dtype=weights["fc.weight"].dtype)
        head.load_state_dict(weights)
    except (KeyError, TypeError, OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder}: expected an exported EAGLE-3 head, found: {error}") from error
    return head
