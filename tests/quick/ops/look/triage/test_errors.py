# SPDX-License-Identifier: Apache-2.0
"""Our own errors: each has a code, triage takes it from there, and their words may change."""

import collections
import json
import re
from pathlib import Path

import pytest

from shared.config import RunConfig
from shared.errors import EXIT_STOPPED, EyrieError
from shared.runtime.log import format_error
from shared.runtime.status import Status
from stages.bench.config import BenchConfig
from stages.dump.config import DumpConfig
from stages.ops.config import TriageConfig
from stages.ops.look.triage.own_errors import TRANSLATED, WRAPPERS
from stages.ops.look.triage.run import run
from stages.synth.config import SynthConfig
from stages.train.config import TrainConfig
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


def test_an_error_of_several_backends_is_shown_in_vllm_s_words() -> None:
    places = collections.defaultdict(set)
    for each in raised():
        places[each.code].add(each.place)
    shared = [code for code, where in places.items() if any("/vllm/" in place for place in where)]
    rows = [line for line in table().splitlines() if line.split(" | ")[0].strip("| ") in shared]
    assert len(rows) > 4
    assert not [row for row in rows if "TensorRT" in "".join(row.split(" | ")[2:4])]


def test_a_setting_that_an_error_names_is_one_that_a_recipe_takes() -> None:
    """A setting of one command alone is named by its flag: the stage itself refuses it in a recipe."""
    known = {"run": RunConfig, "synth": SynthConfig, "dump": DumpConfig}
    known |= {"train": TrainConfig, "bench": BenchConfig}
    named = re.compile(rf"(?<![\w./-])({'|'.join(known)})\.([a-z]\w*)")
    found = [
        (section, key, each.code)
        for each in raised()
        for section, key in named.findall(f"{each.problem} {each.remedy}")
    ]
    assert len(found) > 80
    assert not [each for each in found if each[1] not in known[each[0]].model_fields]


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
