# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped continues with the rows that it was begun with, though the log has grown."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import EXIT_STOPPED, UserError
from stages.ops.adapt.run import run
from stages.ops.chain import run as chain
from tests.quick.ops.adapt.conftest import asked, grow, write_recipe

Start = Callable[..., bytes]


@pytest.fixture
def start(workspace: Path, no_processes: None, monkeypatch: pytest.MonkeyPatch) -> Start:
    """The command, stopped where its first stage begins; gives the rows to learn from."""
    monkeypatch.setattr(chain, "look_ahead", lambda *_, **__: None)
    monkeypatch.setattr(chain, "run", lambda _: EXIT_STOPPED)

    def start(**flags: Any) -> bytes:
        assert run(asked(workspace, **flags)) == EXIT_STOPPED
        return (workspace / "new" / "traffic" / "train.jsonl").read_bytes()

    return start


def test_a_grown_log_leaves_the_split_as_it_is(
    workspace: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        first = start(max_rows=50)  # two are too many
        assert len(first.splitlines()) == 50
        assert start(max_rows=50) == first
    assert "came since" not in caplog.text
    kept = "50 chats to learn from, 8 held out, 2 left out"
    assert f"traffic: {kept} (2 over_max_rows)" in caplog.text
    assert f"traffic is kept: {kept}" in caplog.text
    grow(workspace, 60, 63)
    assert start(max_rows=50) == first
    assert "what came since it was split is not taken, 3 chats; --overwrite" in caplog.text
    assert start(max_rows=50, overwrite=True) != first


def test_traffic_that_is_gone_is_not_needed(
    workspace: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    first = start()
    (workspace / "server.log").unlink()
    assert start() == first
    assert "what has come since the split is not known, nor needed: " in caplog.text


@pytest.mark.parametrize("name", ["train.jsonl", "held_out.jsonl"])
def test_rows_that_somebody_edited_or_cut_are_refused(
    workspace: Path, start: Start, name: str
) -> None:
    first = start()
    rows = workspace / "new" / "traffic" / name
    whole = rows.read_text()
    rows.write_text("".join(whole.splitlines(keepends=True)[:3]))
    with pytest.raises(UserError, match=f"{name}: expected the rows that the traffic") as refused:
        start()
    assert refused.value.code == "split-rows-changed"
    rows.write_text(whole)
    assert start() == first
    rows.write_text("x")
    assert start(overwrite=True) == first


def test_a_split_of_an_earlier_version_continues(workspace: Path, start: Start) -> None:
    first = start()
    path = workspace / "new" / "traffic" / "split.json"
    record = json.loads(path.read_text())
    del record["files"]
    path.write_text(json.dumps(record))
    assert start() == first


def test_the_same_traffic_under_another_path_is_the_same(workspace: Path, start: Start) -> None:
    first = start()
    assert start(traffic=str(workspace / "server.log")) == first


@pytest.mark.parametrize(
    ("flags", "bench", "found"),
    [
        ({"max_rows": 10}, {}, "max_rows: was 2000, now 10"),
        ({"traffic": "other.log"}, {}, "--traffic: was server.log, now other.log"),
        ({}, {"max_tokens": 17}, "bench: was .*16.*, now .*17"),
    ],
)
def test_other_traffic_or_settings_are_refused(
    workspace: Path, start: Start, flags: dict[str, Any], bench: dict[str, object], found: str
) -> None:
    first = start()
    (workspace / "other.log").write_text((workspace / "server.log").read_text() * 2 + "x")
    write_recipe(workspace, {"bench": bench})
    with pytest.raises(UserError, match=found) as refused:
        start(**flags)
    assert refused.value.code == "split-settings"
    assert (workspace / "new" / "traffic" / "train.jsonl").read_bytes() == first
    assert start(**flags, overwrite=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("counts", []),
        ("counts", {}),
        ("too_many", "x"),
        ("made_of", {}),
        ("made_of", None),
        ("files", {"a": 1}),
    ],
)
def test_a_damaged_record_is_refused(
    workspace: Path, start: Start, key: str, value: object
) -> None:
    start()
    path = workspace / "new" / "traffic" / "split.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=rf"split\.json: {key}") as refused:
        start()
    assert refused.value.code == "record-invalid" and "--overwrite" in refused.value.remedy
    assert start(overwrite=True)
