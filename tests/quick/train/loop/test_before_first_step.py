# SPDX-License-Identifier: Apache-2.0
"""What a training computes before its first step: of whole shards, once, of the samples that are used."""

import dataclasses
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shared.contracts import hidden_states
from shared.contracts.head_config import HeadConfig
from shared.errors import RetryableError, Stopped, UserError
from shared.runtime import process
from shared.runtime.status import Status, read_status
from shared.target.tensors import TargetTensors
from stages.train.data.dataset import Dataset
from stages.train.objective.in_vocab import in_vocab_shares
from tests.quick.train.export.small_head import CONFIG, make_head
from tests.quick.train.loop.small_training import PROMPT_TOKENS, dataset, random_tensors

WHOLE = dataclasses.replace(CONFIG, draft_vocab_size=CONFIG.vocab_size)


def rank_of(count: int) -> Any:
    """The first of `count` ranks, to which the others never tell anything."""
    return SimpleNamespace(
        process_index=0,
        num_processes=count,
        device=torch.device("cpu"),
        mixed_precision="no",
        wait_for_everyone=lambda: None,
    )


def shares_of(
    found: Dataset, head: Any, tensors: TargetTensors, folder: Path, *, ranks: int = 1
) -> Any:
    status = Status(folder / "status.json", period_s=0.0)
    return in_vocab_shares(found, head, tensors, folder / "flags", rank_of(ranks), status)


@pytest.mark.parametrize("config", [CONFIG, WHOLE], ids=["partial", "whole"])
@pytest.mark.parametrize("damaged", [0, 1])
def test_every_shard_is_held_to_its_checksum(
    tmp_path: Path, damaged: int, config: HeadConfig
) -> None:
    found, head, tensors = dataset(tmp_path), make_head(config), random_tensors()
    flags = shares_of(found, head, tensors, tmp_path, ranks=1)
    assert [len(part) for part in flags] == [len(shard.input_ids) for shard in found.shards]
    shutil.rmtree(tmp_path / "flags", ignore_errors=True)
    path = tmp_path / hidden_states.shard_name(damaged)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name}: expected the SHA-256"):
        shares_of(found, head, tensors, tmp_path, ranks=1)


def test_flags_that_another_rank_wrote_elsewhere_may_be_there_later(tmp_path: Path) -> None:
    found, head, tensors = dataset(tmp_path), make_head(), random_tensors()
    with pytest.raises(RetryableError, match=r"00001\.pt: expected the numbers .* another rank"):
        shares_of(found, head, tensors, tmp_path, ranks=2)
    shares_of(found, head, tensors, tmp_path, ranks=1)
    flags = shares_of(found, head, tensors, tmp_path, ranks=2)
    assert len(flags) == len(found.shards)


def test_what_comes_before_the_first_step_is_told_and_made_once(tmp_path: Path) -> None:
    found, head, tensors = dataset(tmp_path), make_head(), random_tensors()
    first = shares_of(found, head, tensors, tmp_path)
    told = read_status(tmp_path / "status.json")["progress"]
    assert (told["done"], told["total"], told["unit"]) == (72, 72, "answer tokens")
    (tmp_path / "status.json").unlink()
    again = shares_of(found, head, tensors, tmp_path)
    assert not (tmp_path / "status.json").exists(), "it was computed twice"
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_only_samples_that_are_used_are_computed(tmp_path: Path) -> None:
    """And computed anew for more of them, whose cache must not be taken for theirs."""
    head, tensors = make_head(), random_tensors()
    whole, few = dataset(tmp_path), dataset(tmp_path, max_samples=3)
    counted = []
    for found in (few, whole):
        shares = shares_of(found, head, tensors, tmp_path)
        counted.append((read_status(tmp_path / "status.json")["progress"]["total"], shares))
    (few_tokens, of_few), (all_tokens, of_all) = counted
    assert (few_tokens, all_tokens) == (3 * 9, 72)
    used = [few.used(index) for index in range(len(few.shards))]
    assert sum(int(rows.sum()) for rows in used) == 3 * (PROMPT_TOKENS + 9)
    for part, rest, rows in zip(of_few, of_all, used, strict=True):
        assert torch.equal(part, rest * rows)


@pytest.mark.parametrize("config", [CONFIG, WHOLE], ids=["partial", "whole"])
def test_a_stop_before_the_first_step_is_heard(
    tmp_path: Path, config: HeadConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, asked = dataset(tmp_path), threading.Event()
    asked.set()
    monkeypatch.setattr(process, "_stop", asked)
    with pytest.raises(Stopped, match="no step was made yet"):
        shares_of(found, make_head(config), random_tensors(), tmp_path)
