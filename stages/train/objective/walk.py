# SPDX-License-Identifier: Apache-2.0
"""The walked acceptance length: what an engine would measure, computed by teacher forcing.

In: a draft head and held-out rows with the target's states and greedy answers. Out: drafts and
accepted tokens by position. Cost: one forward pass of the head over the rows.

Teacher forcing is exact here. An engine feeds its own proposals to the chain, but up to the first
miss these are the answer's tokens, and after it nothing is accepted.

Worked example, K = 2, prompt of 3 tokens, 5 scored tokens x3 .. x7. The prompt's pass emits x3.
Slot 2 (state g2, token x3) proposes x4, x5. If both hit, 2 are accepted and x4 x5 x6 are emitted.
The next slot is 2 + 2 + 1 = 5. It proposes x7, x8; if the first misses, 0 are accepted and x7 is
emitted. Now 5 tokens are emitted: 2 drafts, 2 accepted, AL = 1 + 2 / 2 = 2.0, by position [1, 1].
An average over all slots would over-weight easy text, over which the walk takes long strides.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.train.data.batch import Batch
from stages.train.model import DraftHead

CHUNK_BYTES = 64 << 20  # logits alive at once


class Walk(NamedTuple):
    """Counts of a walk; `accepted_by_position[i]` drafts had their (i + 1)-th proposal accepted."""

    accepted: int
    drafts: int
    accepted_by_position: tuple[int, ...]

    @property
    def acceptance_length(self) -> float:
        """1 + accepted / drafts; 1.0 without any draft."""
        return 1.0 + self.accepted / max(self.drafts, 1)

    def acceptance_by_position(self) -> list[float]:
        """accepted_by_position[i] / drafts, as vLLM counts it; it never rises with i."""
        return [count / max(self.drafts, 1) for count in self.accepted_by_position]


def walk(hits: Tensor, *, first_slot: int, num_scored_tokens: int) -> Walk:
    """Walk one answer as the engine does.

    Args:
        hits: [S, K] bool, whether slot s, fed with the answer's tokens, proposes token s + 2 + k.
        first_slot: the last slot of the prompt.
        num_scored_tokens: stop after this many answer tokens, including the one that the prompt's
            pass emits. The last draft counts whole even if it goes further, as in the engine.

    Raises:
        ValueError: the walk left `hits`: the answer must be K - 1 tokens longer than scored.
    """
    return _walk(_joint(hits), hits.shape[1], first_slot, num_scored_tokens)


def _joint(hits: Tensor) -> list[int]:
    """[S] length of each slot's joint prefix of hits."""
    lengths: list[int] = hits.long().cumprod(1).sum(1).tolist()
    return lengths


def _walk(joint: Sequence[int], num_draft_tokens: int, first_slot: int, num_scored: int) -> Walk:
    by_position = [0] * num_draft_tokens
    drafts, emitted = 0, 1
    while emitted < num_scored:
        slot = first_slot + emitted - 1
        if slot >= len(joint):
            raise ValueError(
                f"the walk needs hits for slot {slot}, found {len(joint)} slots: give an answer of "
                f"{num_scored + num_draft_tokens - 1} tokens or score fewer."
            )
        drafts += 1
        for position in range(joint[slot]):
            by_position[position] += 1
        emitted += joint[slot] + 1
    return Walk(sum(by_position), drafts, tuple(by_position))


def combine(walks: Iterable[Walk], num_draft_tokens: int) -> Walk:
    """Several walks as one. Counts add up, so long answers weigh more, as in the engine."""
    accepted, drafts, by_position = 0, 0, [0] * num_draft_tokens
    for part in walks:
        accepted += part.accepted
        drafts += part.drafts
        by_position = [a + b for a, b in zip(by_position, part.accepted_by_position, strict=True)]
    return Walk(accepted, drafts, tuple(by_position))


@torch.no_grad()
def slot_hits(head: DraftHead, batch: Batch, num_draft_tokens: int) -> Tensor:
    """[T, K] bool: slot t counts at step k and its proposal is token t + 2 + k."""
    plan = batch.plan_for(num_draft_tokens)
    hidden = head(
        batch.input_ids,
        batch.aux_states,
        offsets=batch.offsets,
        slots=plan.slots,
        num_steps=num_draft_tokens,
        documents=plan.documents,
    )
    hits = torch.zeros(
        len(batch.input_ids), num_draft_tokens, dtype=torch.bool, device=batch.input_ids.device
    )
    # Under autocast each chunk would cast the whole of it.
    lm_head = head.lm_head.weight.to(hidden[0].dtype)
    size = max(1, CHUNK_BYTES // (4 * head.config.draft_vocab_size))
    for step, states in enumerate(hidden):
        best = [
            F.linear(head.to_lm_head(chunk), lm_head).argmax(-1) for chunk in states.split(size)
        ]
        if best:
            proposed = head.to_target_ids(torch.cat(best))
            expected = batch.input_ids[(plan.slots + 2 + step).clamp(max=len(batch.input_ids) - 1)]
            hits[plan.slots, step] = (proposed == expected) & plan.counted[step]
    return hits


def answer_spans(batch: Batch) -> list[tuple[int, int]]:
    """Half-open ranges [start, stop) of tokens: each run of answer tokens in one document.

    A document that starts with an answer has no slot to draft its first token from, so its first
    span starts one token later.
    """
    starts = set(batch.offsets.tolist())
    spans: list[tuple[int, int]] = []
    for token, is_answer in enumerate(batch.loss_mask.tolist()):
        if not is_answer or token in starts:
            continue
        if spans and spans[-1][1] == token:
            spans[-1] = (spans[-1][0], token + 1)
        else:
            spans.append((token, token + 1))
    return spans


def walked_acceptance_length(
    head: DraftHead,
    rows: Iterable[Batch],
    num_draft_tokens: int,
    *,
    num_scored_tokens: int | None = None,
) -> Walk:
    """Walk every answer of the held-out rows with K = `num_draft_tokens`.

    Args:
        rows: packed documents whose answers the target gave greedily.
        num_scored_tokens: of each answer. None, or more than it has, means all but the last K - 1,
            since the walk looks K tokens ahead.
    """
    walks = []
    for batch in rows:
        joint = _joint(slot_hits(head, batch, num_draft_tokens))
        for start, stop in answer_spans(batch):
            known = stop - start - num_draft_tokens + 1
            scored = known if num_scored_tokens is None else min(known, num_scored_tokens)
            walks.append(_walk(joint, num_draft_tokens, start - 1, scored))
    return combine(walks, num_draft_tokens)
