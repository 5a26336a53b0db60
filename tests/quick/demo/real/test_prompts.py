# SPDX-License-Identifier: Apache-2.0
"""Prompts for the pretrained target: enough of them, and none held out that was trained on."""

import itertools
import json
from pathlib import Path

import pytest

from shared.errors import UserError
from stages.demo.real.prompts import KINDS, _part, write_prompts, written


@pytest.mark.parametrize("domain", ["narrow", "broad"])
def test_five_thousand_distinct_prompts_by_seed(domain: str) -> None:
    rows = list(itertools.islice(written(domain, seed=0, is_held_out=False), 5000))  # type: ignore[arg-type]
    again = itertools.islice(written(domain, seed=0, is_held_out=False), 5000)  # type: ignore[arg-type]
    assert rows == list(again)
    assert len({json.loads(row)["prompt"] for row in rows}) == 5000
    assert rows != list(itertools.islice(written(domain, seed=1, is_held_out=False), 5000))  # type: ignore[arg-type]


def test_held_out_prompts_share_no_template() -> None:
    for templates in KINDS.values():
        training, held_out = _part(templates, False), _part(templates, True)
        assert set(training) | set(held_out) == set(templates)
        assert len(held_out) >= 2
        assert not set(training) & set(held_out)


def test_a_users_rows_are_shared_out(tmp_path: Path) -> None:
    given = tmp_path / "mine.jsonl"
    given.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(30)))
    wanted = {"given": given, "domain": "narrow", "rows": 400, "held_out": 8, "seed": 0}
    write_prompts(tmp_path, **wanted)  # type: ignore[arg-type]
    parts = [(tmp_path / name).read_text().split() for name in ("prompts.jsonl", "held_out.jsonl")]
    assert [len(part) for part in parts] == [44, 16]  # two words each: 22 and 8 rows
    assert sorted([*parts[0], *parts[1]]) == sorted(given.read_text().split())
    with pytest.raises(UserError) as refused:
        write_prompts(tmp_path, **{**wanted, "held_out": 16})  # type: ignore[arg-type]
    assert refused.value.code == "prompts-too-few"


def test_prompts_of_an_earlier_run_are_not_replaced_unasked(tmp_path: Path) -> None:
    wanted = {"given": None, "domain": "narrow", "rows": 20, "held_out": 8, "seed": 0}
    write_prompts(tmp_path, **wanted)  # type: ignore[arg-type]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write_prompts(tmp_path, **wanted)  # type: ignore[arg-type]
    for other in ({"seed": 1}, {"held_out": 9}):
        with pytest.raises(UserError) as refused:
            write_prompts(tmp_path, **{**wanted, **other})  # type: ignore[arg-type]
        assert refused.value.code == "other-prompts"
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_prompts(tmp_path, **{**wanted, "seed": 1}, overwrite=True)  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} != before


@pytest.mark.parametrize("broken", ["{half", "[1, 2]", '"text"'])
def test_a_row_that_is_no_object_is_named(tmp_path: Path, broken: str) -> None:
    given = tmp_path / "mine.jsonl"
    rows = [json.dumps({"prompt": f"p{i}"}) for i in range(30)]
    given.write_text("\n".join([*rows[:6], broken, *rows[6:]]))
    with pytest.raises(UserError, match="row 7") as refused:
        write_prompts(tmp_path, given=given, domain="narrow", rows=9, held_out=8, seed=0)
    assert refused.value.code == "prompts-unreadable"
