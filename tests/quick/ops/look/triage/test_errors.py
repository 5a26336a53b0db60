# SPDX-License-Identifier: Apache-2.0
"""Our own errors: each has a code, triage takes it from there, and their words may change."""

import collections
import json
import re
from pathlib import Path

import pytest

from shared.errors import EXIT_STOPPED, EyrieError
from shared.runtime.log import format_error
from shared.runtime.status import Status
from stages.ops.config import TriageConfig
from stages.ops.look.triage.own_errors import TRANSLATED, WRAPPERS
from stages.ops.look.triage.run import run
from tests.error_table import CLASSES, TABLE, raised, table, without_code


def test_every_error_has_a_code() -> None:
    assert without_code() == []


def test_one_code_is_one_kind_of_failure() -> None:
    """One exit code each, but for what is one kind whoever causes it."""
    kinds = collections.defaultdict(set)
    for each in raised():
        if each.code and each.kind in CLASSES:
            kinds[each.code].add(each.kind)
    several = {code: sorted(names) for code, names in kinds.items() if len(names) > 1}
    assert several == {}


def test_the_table_is_of_this_code() -> None:
    assert TABLE.read_text() == table(), "run python -m tests.error_table"


def test_the_table_has_no_empty_cell() -> None:
    rows = [line for line in table().splitlines() if line.startswith("| ")]
    cells = [re.split(r" (?<!\\)\| ", row.strip("| ")) for row in rows]
    assert {len(each) for each in cells} == {5}
    empty = {"...", "see the message"}
    assert not [each[0] for each in cells if empty & set(each[2:4]) or not all(each)]


def test_what_triage_knows_of_our_codes_is_there() -> None:
    codes = {each.code for each in raised()}
    assert codes >= WRAPPERS | TRANSLATED


def triage(workspace: Path, error: EyrieError, capsys: pytest.CaptureFixture[str]) -> dict:
    """The first diagnosis of a train that ended with this error, as the command line ends it."""
    folder = workspace / "r"
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    Status(folder / "status" / "train.json").failed(error)
    record = format_error(error).replace("\n", "\n    ")
    (folder / "logs" / "train.log").write_text(f"2026-11-20T03:12:00Z ERROR train {record}\n")
    assert run(TriageConfig(folder=folder, json=True)) == 3
    first: dict = json.loads(capsys.readouterr().out)["diagnoses"][0]
    return {name: first[name] for name in ("rule", "role", "stage", "rerun", "facts")}


def test_other_words_are_the_same_diagnosis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten of our errors, told in their words and in a foreign failure's."""
    known = {each.code: each for each in raised() if each.code and each.kind in CLASSES}
    known = {c: e for c, e in known.items() if CLASSES[e.kind].exit_code not in (0, EXIT_STOPPED)}
    codes = sorted(known)[:: max(1, len(known) // 12)][:10]
    assert len(codes) == 10
    for code in codes:
        facts, kind = {"path": "/w/x"}, CLASSES[known[code].kind]
        ours = kind("expected 3 gulls, found 2.", code=code, remedy=known[code].remedy, facts=facts)
        others = kind(
            "CUDA out of memory [x]\nTraceback", code=code, remedy="401 gated", facts=facts
        )
        told = [triage(tmp_path, error, capsys) for error in (ours, others)]
        assert told[0] == told[1]
        assert told[0]["rule"] == code
