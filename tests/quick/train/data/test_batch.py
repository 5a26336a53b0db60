# SPDX-License-Identifier: Apache-2.0
"""Which slots count at which TTT step."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.train.data.batch import counted_slots, make_plan
from tests import reference
from tests.quick.train.objective.cases import make_case


def test_the_worked_example_of_counted_slots() -> None:
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1])
    counted = counted_slots(mask, torch.tensor([0, 6, 9]), 2)
    assert counted.int().tolist() == [[0, 1, 1, 1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5),
    num_steps=st.integers(1, 5),
)
def test_counted_slots_follow_their_definition(documents: list[list[bool]], num_steps: int) -> None:
    offsets = torch.tensor([0, *(len(d) for d in documents)]).cumsum(0)
    counted = counted_slots(torch.tensor([bit for d in documents for bit in d]), offsets, num_steps)
    empty = torch.empty(0)
    for step in range(num_steps):
        expected = [
            reference.counts(
                reference.Document(torch.zeros(len(d)), empty, empty, torch.tensor(d)), slot, step
            )
            for d in documents
            for slot in range(len(d))
        ]
        assert counted[step].tolist() == expected


def test_slot_4_at_step_1_is_decided_by_the_argmax_at_token_6() -> None:
    case = make_case(lengths=(9,), answer_share=2.0)
    for token in range(9):
        in_vocab = torch.ones(9, dtype=torch.bool)
        in_vocab[token] = False
        rows = make_plan(dataclasses.replace(case.batch, in_vocab=in_vocab), 2)
        assert rows.slots[4] == 4
        assert bool(rows.in_vocab_slots[1, 4]) == (token != 6)
        assert bool(rows.counted[1, 4])
