# SPDX-License-Identifier: Apache-2.0
"""Which shards a following train wants, when it saves for dump's sake, and what is too small."""

import pytest

from shared.errors import UserError
from stages.train.data.dataset import Sample, shuffled
from stages.train.data.followed import Visits


def samples(*shards: int) -> list[Sample]:
    return [Sample(f"{shard}-{n}", shard, slice(0, 4)) for n, shard in enumerate(shards)]


STEPS = [samples(0, 2), samples(2), samples(0), samples(2, 1), samples(1), samples(2)]


def test_visits_name_each_shard_when_its_turn_comes() -> None:
    visits = Visits(STEPS, stay=[0], window_shards=3)
    reading = visits.reading(0, "d")
    assert (reading.kept, reading.order, reading.next) == ([0], [2, 1, 2], 0)
    # Step 2 reads shard 0 alone, and the next one needs shard 2 still.
    assert [visits.reading(step, "d").next for step in range(7)] == [0, 0, 0, 0, 1, 2, 3]


def test_a_checkpoint_is_due_when_half_the_window_was_read() -> None:
    steps = [samples(shard) for shard in range(8)]
    visits = Visits(steps, stay=[], window_shards=4)
    assert [visits.frees(0, step) for step in range(4)] == [False, False, True, True]
    assert [visits.frees(3, step) for step in range(3, 6)] == [False, False, True]


@pytest.mark.parametrize(("window_shards", "fits"), [(4, False), (5, True)])
def test_a_window_must_hold_what_a_step_reads(window_shards: int, fits: bool) -> None:
    steps = [samples(0, 1, 2), samples(3)]
    if fits:
        Visits(steps, stay=[7, 8], window_shards=window_shards)
    else:
        with pytest.raises(UserError, match="expected at least 5, found 4"):
            Visits(steps, stay=[7, 8], window_shards=window_shards)


def test_shards_follow_one_another_where_they_are_not_mixed() -> None:
    order = shuffled(samples(*(n // 5 for n in range(50))), seed=1, epoch=0, is_mixed=False)
    shards = [sample.shard for sample in order]
    assert [shards[n] for n in range(0, 50, 5) for _ in range(5)] == shards
    assert sorted(set(shards)) == list(range(10)) and shards != sorted(shards)
