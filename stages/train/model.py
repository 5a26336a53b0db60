# SPDX-License-Identifier: Apache-2.0
"""The EAGLE-3 draft head and its training-time test (TTT) over packed documents.

In: token ids, the target's aux hidden states, where documents start, which slots to run.
Out: one hidden state for each slot and TTT step; `to_lm_head` and `lm_head` turn them into logits.
Cost: keys and values for every slot once, everything else for the requested slots only; no [T, T]
tensor, forward or backward.

The surprise: slot t has the state of token t but the embedding of token t + 1, and predicts token
t + 2. Worked example, one document [x0 .. x5], slot 2:

    step  state fed in           embedding  rotary position  attends to (step-0 slots; own chain)
    0     fc(g2)                 x3         2                0 1 2
    1     own output of step 0   x4         3                0 1 2; step 1
    2     own output of step 1   x5         4                0 1 2; steps 1, 2

EAGLE-3.1 changes two inputs. Each of the A aux states has an RMS norm of its own before they are
concatenated (`fc_norm`), and the output that the next step is fed is the one after the head's final
norm (`norm_output`), which lm_head reads too. The same slot, with n_i the norms of the aux states:

    step  state fed in
    0     fc([n_0(g2^0), n_1(g2^1), n_2(g2^2)])
    1     norm(layer's output of step 0)
    2     norm(layer's output of step 1)

P-EAGLE (`parallel`) feeds nothing back: each step after the first is fed a mask m, fc of the learnt
aux states `mask_hidden`, and the embedding of the mask token. No step waits for another, so an engine
drafts all K tokens in one forward pass. The same slot:

    step  state fed in       embedding   rotary position  attends to (step-0 slots; own chain)
    0     fc(g2)             x3          2                0 1 2
    1     m                  mask token  3                0 1 2; step 1
    2     m                  mask token  4                0 1 2; steps 1, 2

Shapes: T packed tokens, N documents, R requested slots, K TTT steps, A aux layers, H hidden size,
V target vocabulary, D draft vocabulary, Hq / Hkv query / key heads, d head size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.contracts.head_config import HeadConfig
from shared.errors import UserError
from stages.train.kernels.attention import ChainAttention
from stages.train.kernels.blocks import Document, attention_blocks, narrowed, narrowed_starts
from stages.train.kernels.fused import FusedChainAttention, is_fused
from stages.train.kernels.norm import RMSNorm
from stages.train.kernels.rotary import Rotary, Rotation
from stages.train.layer import DraftLayer

INIT_STD = 0.02  # as transformers initialises the linear layers of a Llama


def _attention(
    slots: Tensor,
    starts: Tensor,
    offsets: Tensor,
    documents: list[Document] | None,
    window: int | None,
) -> Callable[..., Tensor]:
    """Attention of the requested slots: kernels on an accelerator, blocks on a CPU.

    Slot t at step k stands at position t + k, so a window of W positions shows it its whole chain
    and the step-0 keys of the slots t + k - W + 1 .. t: one fewer each step, as in an engine.

    Args:
        starts: [T] where each token's document starts.
        window: W, above the number of steps; None for no window.
    """
    if is_fused(slots):
        rows, first = slots.to(torch.int32), starts.index_select(0, slots).to(torch.int32)

        def fused(query: Tensor, key: Tensor, value: Tensor, *chain: Tensor) -> Tensor:
            seen = first
            if window is not None:
                seen = narrowed_starts(first, rows, window - len(chain) // 2)
            return FusedChainAttention.apply(query, key, value, rows, seen, *chain)

        return fused
    blocks = documents or attention_blocks(slots, offsets)

    def in_blocks(query: Tensor, key: Tensor, value: Tensor, *chain: Tensor) -> Tensor:
        seen = blocks
        if window is not None:
            seen = narrowed(blocks, slots, window - len(chain) // 2)
        return ChainAttention.apply(query, key, value, seen, *chain)

    return in_blocks


class DraftHead(nn.Module):
    """An EAGLE-3 head of any variant; its `state_dict` has exactly the keys of the exported file.

    Args:
        embed_tokens: [V, H] the target's embeddings: frozen, shared, never saved with the head.
        d2t: [D] int64 offsets, `target_id = draft_id + d2t[draft_id]`; None if D = V.
        lm_head: [D, H] the target's rows as initial values; None initialises at random.
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
        self.recompute_activations = False  # of the layer, in the backward pass
        self.rotary = Rotary(config)
        num_aux, aux_size = len(config.aux_layers), config.target_hidden_size
        if config.variant.norm_before_fc:
            self.input_norm = RMSNorm(num_aux * aux_size, config.rms_norm_eps)
        if config.variant.fc_norm:
            self.fc_norm = nn.ModuleList(
                RMSNorm(aux_size, config.rms_norm_eps) for _ in range(num_aux)
            )
        if config.variant.parallel:
            # Small, so that AdamW can turn it: a head of the demo walked 2.89 with std 1, 2.98 so.
            self.mask_hidden = nn.Parameter(INIT_STD * torch.randn(1, num_aux * aux_size))
        self.fc = nn.Linear(num_aux * aux_size, config.hidden_size, bias=False)
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
                f"expected target embeddings of shape {list(expected)} for this draft head, found "
                f"{list(embed_tokens.shape)}.",
                code="head-embeddings",
                remedy="Give the target that the head was made for.",
                facts={"expected": list(expected), "found": list(embed_tokens.shape)},
            )
        self.register_buffer("embed_tokens", embed_tokens.detach(), persistent=False)
        if (d2t is None) != (config.draft_vocab_size == config.vocab_size):
            raise UserError(
                f"expected d2t if and only if the draft vocabulary ({config.draft_vocab_size} tokens) "
                f"is smaller than the target's ({config.vocab_size}).",
                code="head-d2t",
                remedy="Give a head whose tensors and config.json belong together.",
            )
        if d2t is not None:
            t2d = torch.zeros(config.vocab_size, dtype=torch.bool, device=d2t.device)
            t2d[d2t + torch.arange(len(d2t), device=d2t.device)] = True
            self.register_buffer("d2t", d2t.detach().clone())
            self.register_buffer("t2d", t2d)

    def forward(
        self,
        tokens: Tensor,
        states: Tensor,
        *,
        offsets: Tensor,
        slots: Tensor,
        num_steps: int,
        documents: list[Document] | None = None,
    ) -> list[Tensor]:
        """The output [R, H] of the requested slots at each of `num_steps` TTT steps.

        It is what the next step is fed: the state before the final norm or, with `norm_output`,
        after it. `to_lm_head` makes of either what lm_head reads.

        Args:
            tokens: [T] int64; tokens past the last state may follow, of the last document.
            states: [T, A*H].
            offsets: [N+1] int64, where documents start and the last one ends.
            slots: [R] int64, ascending. If t + 1 + k lies outside the slot's document the output
                is meaningless, and the caller masks it.
            documents: `attention_blocks(slots, offsets)`, if made before.
        """
        rows = torch.arange(len(states), device=tokens.device)
        starts = offsets[torch.bucketize(rows, offsets, right=True) - 1]
        attend = _attention(slots, starts, offsets, documents, self.config.variant.window)
        positions = rows - starts
        embedding_half, state_half = self.midlayer.self_attn.halves()
        by_token = self._by_token(tokens, embedding_half)
        residual = self.fc(self._normed_aux(self._as_input(states)))  # [T, H]
        mask = (
            self._mask(embedding_half, state_half)
            if self.config.variant.parallel and num_steps > 1
            else ()
        )
        outputs: list[Tensor] = []
        step_0: tuple[Tensor, ...] = ()
        chain: list[Tensor] = []
        for step in range(num_steps):
            if step and mask:
                residual, projected = (x.expand(len(rows), -1) for x in mask)
            else:
                inputs = (rows + 1 + step).clamp(max=len(tokens) - 1)
                # index_select has a far cheaper backward than indexing with brackets.
                embedded = by_token.index_select(0, inputs)
                residual, projected = self._before_attention(residual, embedded, state_half)
            query, key, value = self._heads(projected, positions + step)
            if step == 0:
                # Every slot is a key at step 0; after that only the requested slots run.
                step_0 = (key, value)
                query, residual = query.index_select(0, slots), residual.index_select(0, slots)
                rows, positions = slots, positions[slots]
            else:
                chain += [key, value]
            residual = self._after_attention(residual, attend(query, *step_0, *chain))
            outputs.append(residual)
        return outputs

    def to_lm_head(self, outputs: Tensor) -> Tensor:
        """What lm_head reads: the outputs [..., H] of any step after the final norm."""
        normed: Tensor = outputs if self.config.variant.norm_output else self.norm(outputs)
        return normed

    def _by_token(self, tokens: Tensor, embedding_half: Tensor) -> Tensor:
        """[n, (Hq + 2 Hkv) d] projected embeddings of token ids [n]."""
        embeddings = self._as_input(F.embedding(tokens, self.embed_tokens))
        return F.linear(self.midlayer.input_layernorm(embeddings), embedding_half)

    def _mask(self, embedding_half: Tensor, state_half: Tensor) -> tuple[Tensor, Tensor]:
        """`_before_attention` of the mask, one row: slots and steps differ in its rotation alone."""
        token = torch.full((1,), self.config.mask_token or 0, device=self.embed_tokens.device)
        state = self.fc(self._normed_aux(self._as_input(self.mask_hidden)))
        return self._before_attention(state, self._by_token(token, embedding_half), state_half)

    def _normed_aux(self, states: Tensor) -> Tensor:
        """[T, A*H] aux states as fc reads them."""
        if self.config.variant.norm_before_fc:
            states = self.input_norm(states)
        if self.config.variant.fc_norm:
            parts = states.chunk(len(self.fc_norm), dim=-1)
            states = torch.cat([norm(x) for norm, x in zip(self.fc_norm, parts, strict=True)], -1)
        return states

    def _as_input(self, x: Tensor) -> Tensor:
        """`x` in the dtype of products; autocast would make a copy in float32 and cast it back."""
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return x.to(torch.get_autocast_dtype(kind))
        return x.to(self.fc.weight.dtype)

    def _before_attention(
        self, residual: Tensor, embedded: Tensor, state_half: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual [n, H], and what query, key and value are made of [n, (Hq + 2 Hkv) d].

        Args:
            embedded: [n, (Hq + 2 Hkv) d] the embeddings' part of the latter.
        """
        normed = self.midlayer.hidden_norm(residual)
        residual = normed if self.config.variant.norm_before_residual else residual
        return residual, F.linear(normed, state_half) + embedded

    def _after_attention(self, residual: Tensor, attended: Tensor) -> Tensor:
        """[R, H] the step's output, as the next step is fed it."""
        finish = self.midlayer.after_attention
        if self.recompute_activations and torch.is_grad_enabled():
            output: Tensor = checkpoint(finish, residual, attended, use_reentrant=False)
        else:
            output = finish(residual, attended)
        return self.norm(output) if self.config.variant.norm_output else output

    def _heads(self, projected: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, (Hq + 2 Hkv) d] to rotated query [n, Hq, d], rotated key and value [n, Hkv, d]."""
        cos, sin = self.rotary.table(positions, projected.dtype)
        num_queries, num_keys = self.config.num_attention_heads, self.config.num_key_value_heads
        # The backward of split is one copy, that of slices several.
        heads = projected.unflatten(1, (-1, self.config.head_dim))
        to_rotate, value = heads.split([num_queries + num_keys, num_keys], dim=1)
        if self.config.variant.qk_norm:
            attention, pair = self.midlayer.self_attn, to_rotate.split([num_queries, num_keys], 1)
            to_rotate = torch.cat((attention.q_norm(pair[0]), attention.k_norm(pair[1])), dim=1)
        query, key = Rotation.apply(to_rotate, cos, sin).split([num_queries, num_keys], dim=1)
        return query, key, value

    def token_ids(self) -> Tensor:
        """[D] the target's id of each draft id."""
        return self.to_target_ids(
            torch.arange(self.config.draft_vocab_size, device=self.embed_tokens.device)
        )

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """Draft ids to the target's ids, any shape."""
        if self.config.draft_vocab_size == self.config.vocab_size:
            return draft_ids
        return draft_ids + self.d2t[draft_ids]
