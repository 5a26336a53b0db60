# SPDX-License-Identifier: Apache-2.0
"""The walk against a simulated engine, on tables and on a head that drafts for itself."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contracts.head_config import HeadConfig
from stages.train.data.batch import Batch
from stages.train.model import DraftHead
from stages.train.objective.walk import (
    Walk,
    answer_spans,
    combine,
    slot_hits,
    walk,
    walked_acceptance_length,
)
from tests import reference

CONFIG = HeadConfig(
    hidden_size=8,
    target_hidden_size=8,
    intermediate_size=12,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=5,
    draft_vocab_size=3,
    rms_norm_eps=1e-5,
    rope_theta=20.0,
    max_position_embeddings=128,
    aux_layers=(1,),
)
SHAPE = reference.Shape(2, 1, 4, 20.0, 1e-5)


def test_the_worked_example() -> None:
    """Prompt of 3, five scored tokens: slot 2 hits twice, slot 5 misses at once."""
    hits = torch.zeros(8, 2, dtype=torch.bool)
    hits[2] = True
    hits[5] = torch.tensor([False, True])  # a hit behind a miss is worth nothing
    hits[3] = hits[4] = True  # slots the walk strides over
    result = walk(hits, first_slot=2, num_scored_tokens=5)
    assert result == Walk(accepted=2, drafts=2, accepted_by_position=(1, 1))
    assert result.acceptance_length == 2.0
    assert result.acceptance_by_position() == [0.5, 0.5]


def test_a_single_scored_token_needs_no_draft() -> None:
    result = walk(torch.ones(3, 2, dtype=torch.bool), first_slot=1, num_scored_tokens=1)
    assert result == Walk(0, 0, (0, 0))
    assert result.acceptance_length == 1.0


def test_a_walk_past_the_known_hits_is_refused() -> None:
    with pytest.raises(ValueError, match="hits for slot 4, found 4 slots"):
        walk(torch.zeros(4, 2, dtype=torch.bool), first_slot=2, num_scored_tokens=5)


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(), num_draft=st.integers(1, 4), first=st.integers(0, 3), scored=st.integers(1, 12)
)
def test_a_walk_is_what_the_engine_does(
    data: st.DataObject, num_draft: int, first: int, scored: int
) -> None:
    row = st.lists(st.booleans(), min_size=num_draft, max_size=num_draft)
    hits = data.draw(st.lists(row, min_size=first + scored, max_size=first + scored))
    accepted = reference.engine_walk(hits, first, scored)
    result = walk(torch.tensor(hits), first_slot=first, num_scored_tokens=scored)
    assert (result.accepted, result.drafts) == (sum(accepted), len(accepted))
    by_position = [sum(count > i for count in accepted) for i in range(num_draft)]
    assert list(result.accepted_by_position) == by_position
    assert combine([result, result], num_draft).accepted == 2 * sum(accepted)


def make_batch(lengths: list[int], masks: list[list[int]], *, seed: int) -> Batch:
    torch.manual_seed(seed)
    total = sum(lengths)
    return Batch(
        input_ids=torch.randint(0, 3, (total,)),
        loss_mask=torch.tensor([bit for mask in masks for bit in mask]).bool(),
        aux_states=torch.randn(total, 8),
        final_states=torch.zeros(total, 8),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        in_vocab=torch.zeros(total, dtype=torch.bool),  # the walk compares ids, not this bit
        sample_ids=(),
    )


def make_head(*, seed: int) -> DraftHead:
    torch.manual_seed(seed)
    head = DraftHead(
        CONFIG, embed_tokens=torch.randn(5, 8), d2t=torch.tensor([0, 0, 1])
    )  # draft ids 0, 1, 2 are tokens 0, 1, 3
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
    return head


def test_answer_spans_are_runs_of_one_document() -> None:
    batch = make_batch([5, 4], [[0, 1, 1, 0, 1], [1, 1, 0, 1]], seed=0)
    # Token 5 starts a document: no slot before it could draft, so its span starts at 6.
    assert answer_spans(batch) == [(1, 3), (4, 5), (6, 7), (8, 9)]


def free_running_accepted(
    head: DraftHead, document: reference.Document, slot: int, num_draft: int
) -> int:
    """Draft from `slot` as an engine does, feeding the chain its own proposals; count acceptances."""
    weights = {name: parameter.detach() for name, parameter in head.named_parameters()}
    tokens = document.tokens.clone()
    proposals = []
    for step in range(num_draft):
        fed = dataclasses.replace(document, tokens=tokens)
        output = reference.chain(weights, SHAPE, head.embed_tokens, fed, slot, step + 1)[-1]
        best = int(reference.logits(weights, SHAPE, output).argmax())
        proposals.append([0, 1, 3][best])
        tokens[slot + 2 + step] = proposals[-1]
    expected = document.tokens[slot + 2 : slot + 2 + num_draft].tolist()
    return next((i for i in range(num_draft) if proposals[i] != expected[i]), num_draft)


@pytest.mark.parametrize("scored", [None, 6])
def test_walked_acceptance_is_that_of_a_head_that_feeds_itself(scored: int | None) -> None:
    """Two documents, one with two turns: teacher-forced hits walk as a free-running chain does."""
    head, num_draft = make_head(seed=0), 3
    masks = [[0, 0, 0, *[1] * 11, 0, 0, *[1] * 9], [0, *[1] * 13]]
    batch = make_batch([25, 14], masks, seed=9)
    batch.input_ids[batch.input_ids == 2] = 3
    spans = [(0, 25, 3, 14), (0, 25, 16, 25), (25, 39, 26, 39)]
    accepted: list[int] = []
    for start, stop, first, last in spans:
        document = reference.Document(
            batch.input_ids[start:stop],
            batch.aux_states[start:stop],
            torch.empty(0),
            torch.empty(0),
        )
        emitted, known = 1, last - first - num_draft + 1
        while emitted < (known if scored is None else min(known, scored)):
            slot = first - start - 1 + emitted - 1
            accepted.append(free_running_accepted(head, document, slot, num_draft))
            emitted += accepted[-1] + 1
    result = walked_acceptance_length(head, [batch], num_draft, num_scored_tokens=scored)
    assert max(accepted) >= 2, "the example must accept something"
    assert min(accepted) == 0, "and reject something"
    assert (result.accepted, result.drafts) == (sum(accepted), len(accepted))
    halves = walked_acceptance_length(head, [batch, batch], num_draft, num_scored_tokens=scored)
    assert halves.drafts == 2 * result.drafts


def test_hits_are_false_where_the_answer_ends() -> None:
    head = make_head(seed=5)
    batch = make_batch([12], [[0, 0, *[1] * 6, *[0] * 4]], seed=8)
    hits = slot_hits(head, batch, 3)
    assert hits.shape == (12, 3)
    # The last answer token is 7: slot 5 can only propose token 7, slot 6 nothing.
    assert not hits[5, 1:].any() and not hits[6:].any() and not hits[0].any()
    assert not head.fc.weight.grad and not hits.requires_grad


def test_a_batch_without_answers_walks_nowhere() -> None:
    result = walked_acceptance_length(make_head(seed=0), [make_batch([4], [[0] * 4], seed=0)], 2)
    assert result == Walk(0, 0, (0, 0))
