# SPDX-License-Identifier: Apache-2.0
"""Damaged files end in the reader's own refusal, which names them: no other error, no hang.

A short, seeded part of `python -m tests.faults.fuzz.run`, and every file that once was not refused.
"""

import dataclasses
import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.fuzz import mutate
from tests.faults.fuzz.readers import READERS
from tests.faults.fuzz.run import CORPUS, fault_of

KEPT = sorted(CORPUS.glob("*/*"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 1 << 32))
def test_a_damaged_file_is_refused_or_read(tmp_path: Path, name: str, seed: int) -> None:
    reader = READERS[name]
    place = tmp_path / "whole"
    if not place.exists():
        place.mkdir()
        path = reader.make(place)
        reader.read(path)  # whole, it must be taken
        (tmp_path / "path").write_text(str(path))
        (tmp_path / "content").write_bytes(path.read_bytes())
    path, content = Path((tmp_path / "path").read_text()), (tmp_path / "content").read_bytes()
    mutate.damage(random.Random(seed), path, content, reader.form)
    assert not fault_of(reader, path)


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_failed_is_refused_or_read(tmp_path: Path, kept: Path) -> None:
    reader = READERS[kept.parent.name.replace("_", " ")]
    path = reader.make(tmp_path)
    path.write_bytes(kept.read_bytes())
    assert not fault_of(reader, path)


def test_the_judge_tells_a_crash_a_hang_and_a_nameless_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.faults.fuzz.run.LIMIT_S", 1)
    monkeypatch.setattr("tests.faults.fuzz.run.WAITING_TIMES", 1)
    reader, path = READERS["manifest"], tmp_path / "x"

    def nameless(path: Path) -> None:
        raise reader.refusals[0]("something is wrong")

    for read, told in (
        (lambda path: {}["key"], "KeyError"),
        (lambda path: time.sleep(5), "Hang"),
        (lambda path: all(never == 0 for never in iter(int, 1)), "Hang"),
        (nameless, "names no file"),
    ):
        assert told in fault_of(dataclasses.replace(reader, read=read), path)
