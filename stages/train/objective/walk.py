# SPDX-License-Identifier: Apache-2.0
"""The walked acceptance length: what an engine would measure, from a teacher-forced pass.

In: a draft head and held-out rows with the target's states and greedy answers. Out: drafts and
accepted tokens by position. Cost: one forward of the head over the rows.
The surprise: teacher forcing is exact here. An engine's chain is fed its own proposals, but up to
its first miss these ARE the answer's tokens, and behind the first miss nothing is accepted.

Worked example, K = 2, prompt of 3 tokens, 5 scored tokens x3 .. x7. The prompt's pass emits x3.
Slot 2 (state g2, token x3) proposes x4, x5. Say both hit: 2 accepted, and x4 x5 x6 are emitted.
The next slot is 2 + 2 + 1 = 5, it proposes x7, x8; say the first misses: 0 accepted, x7 emitted.
5 tokens are out: 2 drafts, 2 accepted, AL = 1 + 2 / 2 = 2.0, accepted by position [1, 1].
Averaging over slots instead would over-weight easy text, which the walk skips in long strides.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from stages.train.data.dataset import Batch
from stages.train.model import DraftHead
from stages.train.objective.loss import counted_rows

CHUNK_BYTES = 64 << 20  # logits alive at once


class Walk(NamedTuple):
    """What a walk met; `accepted_by_position[i]` drafts had their (i + 1)-th proposal accepted."""

    accepted: int
    drafts: int
    accepted_by_position: tuple[int, ...]

    @property
    def acceptance_length(self) -> float:
        """1 + accepted / drafts; 1.0 where nothing was drafted."""
        return 1.0 + self.accepted / max(self.drafts, 1)

    def acceptance_by_position(self) -> list[float]:
        """accepted_by_position[i] / drafts, as vLLM counts it: it never rises with i."""
        return [count / max(self.drafts, 1) for count in self.accepted_by_position]


def walk(hits: Tensor, *, first_slot: int, num_scored_tokens: int) -> Walk:
    """Walk one answer as the engine does.

    Args:
        hits: [S, K] bool, whether slot s, fed with the answer's tokens, proposes token s + 2 + k.
        first_slot: the last slot of the prompt.
        num_scored_tokens: stop once so many answer tokens are emitted, the prompt's own included.
            The last draft counts whole even where it runs over, as in the engine's counters.

    Raises:
        ValueError: the walk left `hits`: the answer must be K - 1 tokens longer than scored.
    """
    joint = hits.long().cumprod(1).sum(1).tolist()  # [S], length of the joint prefix
    by_position = [0] * hits.shape[1]
    drafts, emitted = 0, 1
    while emitted < num_scored_tokens:
        slot = first_slot + emitted - 1
        if slot >= len(joint):
            raise ValueError(
                f"the walk needs hits for slot {slot}, found {len(joint)} slots: give an answer of "
                f"{num_scored_tokens + hits.shape[1] - 1} tokens or score fewer."
            )
        drafts += 1
        for position in range(joint[slot]):
            by_position[position] += 1
        emitted += joint[slot] + 1
    return Walk(sum(by_position), drafts, tuple(by_position))


def combine(walks: Iterable[Walk], num_draft_tokens: int) -> Walk:
    """Several walks as one: counts add up, so long answers weigh more, as in the engine."""
    accepted, drafts, by_position = 0, 0, [0] * num_draft_tokens
    for part in walks:
        accepted += part.accepted
        drafts += part.drafts
        by_position = [a + b for a, b in zip(by_position, part.accepted_by_position, strict=True)]
    return Walk(accepted, drafts, tuple(by_position))


@torch.no_grad()
def slot_hits(head: DraftHead, batch: Batch, num_draft_tokens: int) -> Tensor:
    """[T, K] bool: slot t's k-th proposal is token t + 2 + k, all of it answer of one document."""
    rows = counted_rows(batch, num_draft_tokens)
    hidden = head(
        batch.input_ids,
        batch.aux_states,
        offsets=batch.offsets,
        slots=rows.slots,
        num_steps=num_draft_tokens,
    )
    hits = torch.zeros(
        len(batch.input_ids), num_draft_tokens, dtype=torch.bool, device=batch.input_ids.device
    )
    size = max(1, CHUNK_BYTES // (4 * head.config.draft_vocab_size))
    for step, states in enumerate(hidden):
        best = [head.lm_head(head.norm(chunk)).argmax(-1) for chunk in states.split(size)]
        if best:
            proposed = head.to_target_ids(torch.cat(best))
            expected = batch.input_ids[(rows.slots + 2 + step).clamp(max=len(batch.input_ids) - 1)]
            hits[rows.slots, step] = (proposed == expected) & rows.counted[step]
    return hits


def answer_spans(batch: Batch) -> list[tuple[int, int]]:
    """Half-open ranges [start, stop) of tokens: each run of answer tokens in one document.

    A document that starts with an answer has no slot to draft its first tokens from, so its first
    span starts one token late.
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
        num_scored_tokens: of each answer; None, or more than it has: all but its last K - 1,
            since the walk must know K tokens ahead.
    """
    walks = []
    for batch in rows:
        hits = slot_hits(head, batch, num_draft_tokens)
        for start, stop in answer_spans(batch):
            known = stop - start - num_draft_tokens + 1
            scored = known if num_scored_tokens is None else min(known, num_scored_tokens)
            walks.append(walk(hits, first_slot=start - 1, num_scored_tokens=scored))
    return combine(walks, num_draft_tokens)
