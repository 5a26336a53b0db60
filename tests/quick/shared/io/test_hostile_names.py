# SPDX-License-Identifier: Apache-2.0
"""Ids, names and paths that somebody made to be shown or followed: refused, or shown harmless."""

import os
from pathlib import Path

import pytest
import torch

from shared.errors import UserError
from shared.prompts.content import Unusable
from shared.prompts.rows import parse_row
from shared.prompts.sources import Source, read_source
from shared.runtime.status import Accounting
from shared.settings import build
from stages.dump.config import DumpConfig
from stages.dump.plan import ShardPlan, ShardRows
from stages.dump.shards.layouts import write_samples
from stages.dump.sources import open_source
from stages.synth.config import SynthConfig
from tests.models import tiny_llama

HOSTILE_IDS = ["a\0b", "a\nb", "\x1b[2J", "a\u202eb", "x" * 10_000, "\ud800", 10**5000]


@pytest.mark.parametrize("name", HOSTILE_IDS, ids=range(len(HOSTILE_IDS)))
@pytest.mark.parametrize("key", ["id", "category"])
def test_a_name_that_cannot_be_shown_is_refused(key: str, name: object) -> None:
    if key == "category" and isinstance(name, int):
        assert parse_row({"prompt": "x", key: name}).category == ""
        return
    with pytest.raises(Unusable) as refused:
        parse_row({"prompt": "x", key: name})
    assert refused.value.reason in (f"bad_{key}", "not_utf8")


def test_no_sample_id_becomes_a_file_name(tmp_path: Path) -> None:
    ids = ["../../outside", "/tmp/outside", "a/b", "..", "x" * 500]
    tokens = [[1, 2]] * len(ids)
    rows = ShardRows(ids, tokens, tokens)
    for layout in ("shards", "samples"):
        plan = ShardPlan(0, 0, len(ids), 2 * len(ids), "", tmp_path / "plan.parquet")
        states = torch.zeros(2 * len(ids), 2, 4, dtype=torch.bfloat16)
        write_samples(tmp_path / "dump", layout, plan, rows, states, list(range(0, 12, 2)))
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == [*(f"dump/samples/data_{i}.pt" for i in range(5)), "dump/shard_00000.pt"]


def test_states_under_strange_names_are_accounted_for(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    folder.mkdir()
    tiny_llama(tmp_path / "tiny")
    for name in ("a\nb.pt", "\x1b[2J.pt"):
        (folder / name).write_bytes(b"")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.pt")).write_bytes(b"")
    (folder / "nowhere.pt").symlink_to(tmp_path / "none")
    os.mkfifo(folder / "pipe.pt")
    (folder / "folder.pt").mkdir()
    flags = {"workspace": str(tmp_path), "target": "tiny", "states": "states"}
    source = open_source(build(DumpConfig, flags))
    accounting = Accounting()
    assert list(source.rows(tmp_path / "tiny", accounting)) == []
    assert accounting.failed == {"bad_id": 3, "unreadable": 3}
    accounting.write_rejects(tmp_path / "rejects.jsonl")
    assert (tmp_path / "rejects.jsonl").read_text().replace("\n", "").isprintable()


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "", "a\\b", "a\0b", "a\nb", "x" * 256])
def test_a_runs_name_is_one_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="a run's name"):
        build(SynthConfig, {"target": "t", "prompts": "p", "name": name})


def test_a_path_longer_than_any_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        list(read_source(Source(path="x" * 10_000), tmp_path))
