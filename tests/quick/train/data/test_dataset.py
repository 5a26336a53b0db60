# SPDX-License-Identifier: Apache-2.0
"""Files of every layout to batches; a step's samples over ranks and micro-batches; prefetching."""

import itertools
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contracts import hidden_states
from shared.contracts.row_files import RowFile
from shared.errors import UserError
from stages.train.data.dataset import Dataset, Sample, pack, shuffled, split_step, training_steps
from stages.train.data.loader import micro_batches, prefetched

AUX, SIZE = 3, 8
LENGTHS = (5, 3, 4, 9, 2, 7)


def made(lengths: tuple[int, ...] = LENGTHS) -> list[Sample]:
    return [Sample(f"row-{i}", i, slice(0, n)) for i, n in enumerate(lengths)]


def lengths_of(parts: list[list[list[Sample]]]) -> list[list[list[int]]]:
    return [[[sample.num_tokens for sample in micro] for micro in rank] for rank in parts]


def test_the_worked_example_of_a_split_step() -> None:
    samples = made((5, 3, 4, 9))
    assert lengths_of(split_step(samples, num_ranks=2, micro_tokens=9)) == [
        [[9], [3]],
        [[5, 4], []],
    ]
    assert split_step(samples, num_ranks=1, micro_tokens=8) == [pack(samples, 8)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    num_ranks=st.integers(1, 4),
    micro_tokens=st.integers(1, 60),
)
def test_a_split_step_holds_every_sample_once(
    lengths: list[int], num_ranks: int, micro_tokens: int
) -> None:
    samples = made(tuple(lengths))
    parts = split_step(samples, num_ranks=num_ranks, micro_tokens=micro_tokens)
    assert len(parts) == num_ranks
    assert len({len(rank) for rank in parts}) == 1, "ranks meet in every micro-batch"
    flat = [sample for rank in parts for micro in rank for sample in micro]
    assert sorted(s.sample_id for s in flat) == sorted(s.sample_id for s in samples)
    for micro in itertools.chain.from_iterable(parts):
        assert len(micro) <= 1 or sum(s.num_tokens for s in micro) <= micro_tokens


def test_an_epoch_s_order_holds_every_sample_and_follows_seed_and_epoch() -> None:
    samples = [Sample(f"{shard}-{i}", shard, slice(0, 1)) for shard in range(30) for i in range(5)]
    order = shuffled(samples, seed=0, epoch=0)
    assert order == shuffled(samples, seed=0, epoch=0)
    assert sorted(s.sample_id for s in order) == sorted(s.sample_id for s in samples)
    assert order != shuffled(samples, seed=0, epoch=1)
    assert order != shuffled(samples, seed=1, epoch=0)


def test_an_epoch_of_400_000_files_is_ordered_in_seconds() -> None:
    samples = [Sample(f"row-{i}", i, slice(0, 1)) for i in range(400_000)]  # one file per sample
    started_s = time.process_time()
    assert len(shuffled(samples, seed=0, epoch=0)) == len(samples)
    assert time.process_time() - started_s < 12  # about 1; a minute if each draw moves the rest


def test_few_shards_are_in_work_at_a_time() -> None:
    samples = [Sample(f"{shard}-{i}", shard, slice(0, 1)) for shard in range(40) for i in range(50)]
    order = shuffled(samples, seed=3, epoch=0)
    first_seen = {}
    for place, sample in enumerate(order):
        first_seen.setdefault(sample.shard, place)
    started = sorted(first_seen.values())
    # Shard n + 8 cannot be touched before n shards' worth of samples were drawn.
    assert all(place >= 50 * n for n, place in enumerate(started[8:], start=0))
    assert len({sample.shard for sample in order[:60]}) >= 6, "and those few are mixed"


def write_files(folder: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same three rows in each layout; returns their ids and states."""
    torch.manual_seed(0)
    ids = [torch.randint(0, 50, (n,)) for n in (4, 6, 3)]
    masks = [torch.arange(n) % 2 for n in (4, 6, 3)]
    states = [torch.randn(n, AUX + 1, SIZE).to(torch.bfloat16) for n in (4, 6, 3)]
    (folder / "samples").mkdir()
    (folder / "modelopt").mkdir()
    hidden_states.write_shard(
        folder / "shard_00000.pt",
        input_ids=[row.tolist() for row in ids],
        loss_masks=[row.tolist() for row in masks],
        states=states,
        sample_ids=["data_0", "data_1", "data_2"],
    )
    for i, (row, mask, state) in enumerate(zip(ids, masks, states, strict=True)):
        plain = {"input_ids": row, "loss_mask": mask}
        listed = [part.clone() for part in state.unbind(1)]
        torch.save({**plain, "hidden_states": listed}, folder / "samples" / f"data_{i}.pt")
        theirs = {"hidden_states": listed[-1], "aux_hidden_states": torch.cat(listed[:-1], dim=1)}
        torch.save({**plain, **theirs}, folder / "modelopt" / f"data_{i}.pt")
    return ids, states


def dataset(
    folder: Path, names: list[str], *, holdout: float = 0.0, max_samples: int | None = None
) -> Dataset:
    config = {"hidden_states": {"layer_ids": [2, 4, 5, 8]}, "model": {"hidden_size": SIZE}}
    split = {"holdout_fraction": holdout, "max_holdout_samples": 1, "max_samples": max_samples}
    found = Dataset(folder, config, names, **split)
    flags = [torch.ones(len(shard.input_ids), dtype=torch.bool) for shard in found.shards]
    found.set_in_vocab(flags)
    return found


def test_fewer_samples_train_on_a_part_and_hold_out_the_same(tmp_path: Path) -> None:
    write_files(tmp_path)
    splits = [
        dataset(tmp_path, ["shard_00000.pt"], holdout=0.3, max_samples=most)
        for most in (1, 2, None)
    ]
    one, two, whole = ({sample.sample_id for sample in found.training} for found in splits)
    assert (len(one), len(two), len(whole)) == (1, 2, 2)
    assert one < two == whole
    assert splits[0].held_out == splits[1].held_out == splits[2].held_out != []
    assert not whole & {sample.sample_id for sample in splits[0].held_out}


def test_a_single_sample_is_trained_on(tmp_path: Path) -> None:
    write_files(tmp_path)
    found = dataset(tmp_path, ["samples/data_0.pt"], holdout=0.3)
    assert len(found.training) == 1 and found.held_out == []


@pytest.mark.parametrize("layout", ["samples", "modelopt"])
def test_one_file_a_row_gives_the_batch_of_a_shard(tmp_path: Path, layout: str) -> None:
    ids, states = write_files(tmp_path)
    whole = dataset(tmp_path, ["shard_00000.pt"])
    apart = dataset(tmp_path, [f"{layout}/data_{i}.pt" for i in range(3)])
    expected, found = whole.batch(whole.training), apart.batch(apart.training)
    for name in ("input_ids", "loss_mask", "aux_states", "final_states", "offsets"):
        assert torch.equal(getattr(expected, name), getattr(found, name)), name
    assert torch.equal(found.final_states, torch.cat(states)[:, -1])
    assert torch.equal(found.aux_states[:, :SIZE], torch.cat(states)[:, 0])
    assert found.sample_ids == expected.sample_ids
    assert torch.equal(found.input_ids, torch.cat(ids))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({"hidden_states": [torch.zeros(4, SIZE)] * 3}, "expected the shapes"),
        ({"hidden_states": [torch.zeros(5, SIZE)] * 4}, "expected the shapes"),
        ({"loss_mask": torch.zeros(3)}, "loss_mask [3] for 4 input_ids"),
        ({"loss_mask": torch.tensor([0, 2, 1, 0])}, "loss_mask: expected only 0 and 1"),
        ({"loss_mask": torch.tensor([0, 1, 1, 0.5])}, "loss_mask: expected only 0 and 1"),
        ({"aux_hidden_states": torch.zeros(4, 2 * SIZE)}, "expected the shapes"),
    ],
)
def test_a_damaged_row_file_is_named(tmp_path: Path, damage: dict[str, object], told: str) -> None:
    write_files(tmp_path)
    path = tmp_path / "samples" / "data_0.pt"
    torch.save(torch.load(path, weights_only=True) | damage, path)
    with pytest.raises(UserError) as error:
        _ = RowFile(path, AUX + 1, SIZE).input_ids
    assert told in str(error.value)
    assert str(path) in str(error.value)
    path.write_bytes(b"no torch file")
    with pytest.raises(UserError, match="expected one conversation's states"):
        _ = RowFile(path, AUX + 1, SIZE).input_ids


@pytest.mark.parametrize("threads", [1, 3])
def test_prefetching_keeps_the_order_and_runs_ahead_but_not_far(threads: int) -> None:
    produced: list[int] = []

    def square(number: int) -> int:
        time.sleep(0.01 * (number % 3 == 0))  # with several threads later ones are ready first
        produced.append(number)
        return number**2

    taken = prefetched(iter(range(20)), square, depth=2, threads=threads)
    assert next(taken) == 0
    deadline = time.monotonic() + 60
    while len(produced) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert sorted(produced) == [0, 1, 2]  # one taken, two ready
    assert list(taken) == [number**2 for number in range(1, 20)]


def test_prefetching_raises_what_ended_the_thread_and_ends_with_its_reader() -> None:
    def failing(number: int) -> int:
        if number == 2:
            raise UserError("a damaged file", code="damaged")
        return number

    taken = prefetched(itertools.count(1), failing)
    assert next(taken) == 1
    with pytest.raises(UserError, match="a damaged file"):
        next(taken)
    before = threading.active_count()
    endless = prefetched(itertools.count(), float)
    next(endless)
    endless.close()
    assert threading.active_count() == before


def test_a_rank_without_a_sample_gets_a_batch_in_which_nothing_counts(tmp_path: Path) -> None:
    write_files(tmp_path)
    whole = dataset(tmp_path, ["shard_00000.pt"])
    steps = list(training_steps(whole.training, batch_tokens=6, seed=0, epochs=2))
    assert sum(len(step) for step in steps) == 6
    seen = []
    for rank in (0, 1):
        sizes = {"num_ranks": 2, "micro_tokens": 100, "num_steps": 1}
        made_here = [micro_batches(whole, step, rank=rank, **sizes) for step in steps]
        seen.append([batch for batches in made_here for batch in batches])
    assert len(seen[0]) == len(seen[1]) == len(steps)
    alone = next(i for i, step in enumerate(steps) if len(step) == 1)
    assert seen[0][alone].loss_mask.any()
    assert not seen[1][alone].loss_mask.any()
    assert not seen[1][alone].plan.counted.any()
    assert torch.equal(seen[1][alone].input_ids, seen[0][alone].input_ids)
