# SPDX-License-Identifier: Apache-2.0
"""What stages hand each other: prompts, Parquet, `.pt` shards, the vocabulary, layer ids."""

import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contracts import conversations, hidden_states, layers, vocab
from shared.contracts.conversations import Conversation
from shared.errors import UserError
from shared.io import files
from shared.io.tensor_files import save_tensors


def row(sample_id: str = "a", **changes: object) -> Conversation:
    values = {
        "sample_id": sample_id,
        "conversation_id": sample_id,
        "source": "prompts.jsonl",
        "category": "sums",
        "messages": ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}),
        "input_ids": (7, 8, 9, 20, 2),
        "loss_spans": ((3, 5),),
        "finish_reason": "stop",
        "num_prompt_tokens": 3,
        "num_completion_tokens": 2,
    }
    return Conversation(**{**values, **changes})  # type: ignore[arg-type]


def test_loss_mask_worked_example() -> None:
    assert row().loss_mask() == [0, 0, 0, 1, 1]


def test_conversations_survive_parquet(tmp_path: Path) -> None:
    rows = [row("a"), row("b", loss_spans=((1, 2), (3, 5)))]
    conversations.write_part(tmp_path / conversations.part_name(1), rows[1:])
    conversations.write_part(tmp_path / conversations.part_name(0), rows[:1])
    assert list(conversations.read_conversations(tmp_path)) == rows
    stored = pq.read_table(tmp_path / conversations.part_name(0))
    assert stored.schema.field("input_ids").type == pa.list_(pa.int32())
    assert (
        pq.ParquetFile(tmp_path / conversations.part_name(0))
        .metadata.row_group(0)
        .column(0)
        .compression
        == "ZSTD"
    )


def test_damaged_or_foreign_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    conversations.write_part(path, [row()])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="part-00000"):
        list(conversations.read_part(path))
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(UserError, match="schema version 2, found version none"):
        list(conversations.read_part(path))
    conversations.write_part(path, [row(loss_spans=((3, 9),))])
    with pytest.raises(UserError, match="do not fit"):
        list(conversations.read_part(path))


def write_shard(path: Path) -> list[torch.Tensor]:
    states = [torch.randn(3, 4, 8), torch.randn(2, 4, 8)]
    hidden_states.write_shard(
        path,
        input_ids=[[5, 6, 7], [8, 9]],
        loss_masks=[[0, 1, 1], [0, 1]],
        states=states,
        sample_ids=["a", "b"],
    )
    return states


def test_a_shard_maps_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / hidden_states.shard_name(0)
    states = write_shard(path)
    shard = hidden_states.read_shard(path, num_states=4, hidden_size=8)
    assert (len(shard), shard.offsets.tolist()) == (2, [0, 3, 5])
    assert shard.input_ids[shard.rows(1)].tolist() == [8, 9]
    assert torch.equal(shard.hidden_states[shard.rows(1)], states[1].bfloat16())
    assert shard.hidden_states.numel() * 2 == layers.state_bytes(5, 3, 8)


class Payload:
    """What a hostile file might hold: code that runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (open, ("/tmp/eyrie-must-not-appear", "w"))


def test_hostile_damaged_or_misshapen_shards_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard_00000.pt"
    marker = Path("/tmp/eyrie-must-not-appear")
    torch.save({"input_ids": Payload()}, path)
    with pytest.raises(UserError, match="shard_00000"):
        hidden_states.read_shard(path, num_states=4, hidden_size=8)
    assert not marker.exists()
    write_shard(path)
    for num_states, hidden_size in ((3, 8), (4, 7)):
        with pytest.raises(UserError, match="hidden_states: expected"):
            hidden_states.read_shard(path, num_states=num_states, hidden_size=hidden_size)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="shard_00000"):
        hidden_states.read_shard(path, num_states=4, hidden_size=8)
    torch.save([1], path)
    with pytest.raises(UserError, match="expected a dict"):
        hidden_states.read_shard(path, num_states=4, hidden_size=8)


def test_draft_vocabulary_worked_example() -> None:
    draft = vocab.from_counts(torch.tensor([5, 0, 9, 1, 9, 1]), 3)
    assert draft.d2t.tolist() == [0, 1, 2]
    assert draft.token_ids.tolist() == [0, 2, 4]
    assert draft.t2d.tolist() == [True, False, True, False, True, False]
    assert vocab.coverage(draft, torch.tensor([5, 0, 9, 1, 9, 1])) == 23 / 25


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_draft_vocabulary_invariants(counts: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(counts)))
    draft = vocab.from_counts(torch.tensor(counts), size)
    ids = draft.token_ids.tolist()
    assert ids == sorted(set(ids))
    assert len(ids) == size == int(draft.t2d.sum())
    left_out = [c for i, c in enumerate(counts) if i not in ids]
    assert not left_out or min(counts[i] for i in ids) >= max(left_out)


def test_ties_go_to_the_lower_id() -> None:
    draft = vocab.from_counts(torch.ones(50_000, dtype=torch.int64), 1000)
    assert draft.token_ids.tolist() == list(range(1000))


def test_a_broken_draft_vocabulary_is_refused() -> None:
    draft = vocab.from_counts(torch.tensor([5, 0, 9, 1, 9, 1]), 3)
    rolled = vocab.DraftVocab(draft.d2t.roll(1), draft.t2d)
    narrow = vocab.DraftVocab(draft.d2t.int(), draft.t2d)
    with pytest.raises(UserError, match="ascending"):
        vocab.check(rolled)
    with pytest.raises(UserError, match="int64"):
        vocab.check(narrow)
    with pytest.raises(UserError, match="expected 1 to 2"):
        vocab.from_counts(torch.tensor([1, 2]), 3)


def test_layer_ids_worked_example() -> None:
    assert layers.default_aux_layers(8) == (2, 4, 5)
    assert layers.to_output_ids((2, 4, 5)) == [1, 3, 4]
    assert layers.resolve_aux_layers(None, 32) == (2, 16, 29)


@pytest.mark.parametrize("ids", [[4, 2, 5], [2, 2, 5], [2, 4, 8], [-1, 2, 4], []])
def test_bad_layer_ids_are_refused(ids: list[int]) -> None:
    with pytest.raises(UserError, match="aux_layers"):
        layers.resolve_aux_layers(ids, 8)


def test_default_layers_need_seven() -> None:
    assert len(set(layers.default_aux_layers(7))) == 3
    with pytest.raises(UserError, match="at least 7"):
        layers.default_aux_layers(6)


def test_vocabulary_files_are_kept_never_remade(tmp_path: Path) -> None:
    from stages.train.objective.vocabulary import load_or_make

    first = load_or_make(tmp_path, torch.tensor([5, 0, 9, 1, 9, 1]), 3)
    again = load_or_make(tmp_path, torch.tensor([0, 9, 0, 9, 0, 9]), 3)
    assert torch.equal(first.d2t, again.d2t)
    assert np.load(tmp_path / "d2t.npy").dtype == np.int64
    with pytest.raises(UserError, match="expected a draft vocabulary of 2"):
        load_or_make(tmp_path, torch.tensor([5, 0, 9, 1, 9, 1]), 2)
    np.save(tmp_path / "d2t.npy", np.array([0, 2, 1]))
    with pytest.raises(UserError, match="ascending"):
        load_or_make(tmp_path, torch.tensor([5, 0, 9, 1, 9, 1]), 3)


def test_a_vocabulary_is_kept_from_the_first_checkpoint_on(tmp_path: Path) -> None:
    from stages.train.objective.vocabulary import forget_unbound, load_or_make

    def made(counts: list[int]) -> list[int]:
        forget_unbound(tmp_path)
        return load_or_make(tmp_path, torch.tensor(counts), 3).token_ids.tolist()

    assert made([5, 0, 9, 1, 9, 1]) == [0, 2, 4]
    assert made([0, 9, 0, 9, 0, 9]) == [1, 3, 5], "of another dump, and no weights yet"
    for name in ("latest.pt", "best.pt"):  # a copy by the manifest has the best alone
        files.write_text(tmp_path / "checkpoints" / name, "weights")
        assert made([5, 0, 9, 1, 9, 1]) == [1, 3, 5]
        (tmp_path / "checkpoints" / name).unlink()


@pytest.mark.parametrize(("values", "room"), [(1 << 20, 1 << 20), (100, 512)])
def test_a_full_disk_is_the_operators_and_leaves_nothing_half(
    tmp_path: Path, values: int, room: int
) -> None:
    """A limit on the size of files stands in for the disk's end: torch's writer meets both alike.

    It says something else where all of a file is still in its buffer.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(UserError, match=r"could not write .*state\.pt.*Free some space"):
            save_tensors(tmp_path / "state.pt", {"weights": torch.ones(values)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
