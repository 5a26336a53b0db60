# SPDX-License-Identifier: Apache-2.0
"""Prompts for the pretrained target: enough of them, and none held out that was trained on."""

import collections
import gzip
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import UserError
from stages.demo.real import prompts
from stages.demo.real.prompts import KINDS, _part, write_prompts, written


@pytest.mark.parametrize("domain", ["narrow", "broad"])
def test_five_thousand_distinct_prompts_by_seed(domain: str) -> None:
    rows = list(itertools.islice(written(domain, seed=0, is_held_out=False), 5000))  # type: ignore[arg-type]
    again = itertools.islice(written(domain, seed=0, is_held_out=False), 5000)  # type: ignore[arg-type]
    assert rows == list(again)
    assert len({json.loads(row)["prompt"] for row in rows}) == 5000
    assert rows != list(itertools.islice(written(domain, seed=1, is_held_out=False), 5000))  # type: ignore[arg-type]


def test_a_kind_that_has_no_more_prompts_is_left_out_and_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"problem": ["p {a} {b} {c}"], "instruction": ["i {a}"], "code": ["c {a}"]}
    monkeypatch.setattr(prompts, "KINDS", kinds)
    rows = [
        json.loads(row) for row in itertools.islice(written("broad", seed=0, is_held_out=False), 90)
    ]
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 90
    of_kind = collections.Counter(row["category"] for row in rows)
    assert of_kind == {"problem": 56, "instruction": 17, "code": 17}  # 3 to 19
    assert [message.rpartition(" after ")[0] for message in caplog.messages] == [
        "no new instruction is found",
        "no new code is found",
    ]
    monkeypatch.setitem(kinds, "problem", ["p"])
    assert len(list(written("narrow", seed=0, is_held_out=False))) == 1


def test_held_out_prompts_share_no_template() -> None:
    for templates in KINDS.values():
        training, held_out = _part(templates, False), _part(templates, True)
        assert set(training) | set(held_out) == set(templates)
        assert len(held_out) >= 2
        assert not set(training) & set(held_out)


def test_a_users_rows_are_shared_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = tmp_path / "mine.jsonl"
    given.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(30)))
    wanted = {"given": given, "domain": "narrow", "rows": 400, "held_out": 8, "seed": 0}
    write_prompts(tmp_path, **wanted)  # type: ignore[arg-type]
    parts = [(tmp_path / name).read_text().split() for name in ("prompts.jsonl", "held_out.jsonl")]
    assert [len(part) for part in parts] == [44, 16]  # two words each: 22 and 8 rows
    assert sorted([*parts[0], *parts[1]]) == sorted(given.read_text().split())
    assert not caplog.records
    write_prompts(tmp_path, **{**wanted, "rows": 20, "overwrite": True})  # type: ignore[arg-type]
    assert "2 of 30 rows are not used" in caplog.text
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


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"id": f"q{i}", "prompt": f"What is {i}?"} for i in range(count)]


def shared_out(folder: Path, given: Path, **changes: Any) -> list[list[dict[str, Any]]]:
    """(training rows, held-out rows)."""
    wanted = {"domain": "narrow", "rows": 400, "held_out": 8, "seed": 0, **changes}
    write_prompts(folder, given=given, **wanted)
    names = ("prompts.jsonl", "held_out.jsonl")
    return [[json.loads(line) for line in (folder / name).open()] for name in names]


def in_file(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_no_prompt_is_on_both_sides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "id": f"{row['id']}-{i}"} for i in range(3) for row in rows_of(40)]
    training, held_out = shared_out(tmp_path, in_file(tmp_path / "mine.jsonl", rows))
    asked = [[row["prompt"] for row in part] for part in (training, held_out)]
    assert (len(training), len(held_out)) == (32, 8)
    assert len({*asked[0], *asked[1]}) == 40
    assert "left out as repetitions: 80 rows" in caplog.text
    with pytest.raises(UserError, match="found 40") as refused:  # they alone count
        shared_out(tmp_path, tmp_path / "mine.jsonl", held_out=21)
    assert refused.value.code == "prompts-too-few"


def chats(opening: str, count: int) -> list[Any]:
    first = [{"role": "user", "content": opening}, {"role": "assistant", "content": "Hello."}]
    return [{"messages": [*first, {"role": "user", "content": f"{i}?"}]} for i in range(count)]


def test_chats_that_begin_alike_are_on_one_side(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row for i in range(8) for row in chats(f"Good day {i}", 5)]
    training, held_out = shared_out(tmp_path, in_file(tmp_path / "mine.jsonl", rows))
    first = [{row["messages"][0]["content"] for row in part} for part in (training, held_out)]
    assert not first[0] & first[1]
    assert (len(training), len(held_out)) == (30, 8)
    assert "left out, since held-out ones begin alike: 2 rows" in caplog.text
    with pytest.raises(UserError, match="openings") as refused:
        shared_out(tmp_path / "other", in_file(tmp_path / "mine.jsonl", chats("Hi", 40)))
    assert refused.value.code == "prompts-too-few"


def test_prompts_of_before_are_known_again_and_stay_as_they_are(tmp_path: Path) -> None:
    """As the lines of a file were shared out before they were read as prompts."""
    lines = [
        *(json.dumps(row, separators=(",", ":"), ensure_ascii=False) for row in rows_of(20)),
        *(f'{{"prompt": "cre\u0300me {i}", "score": NaN}}' for i in range(20)),
    ]
    (tmp_path / "mine.jsonl").write_text("\n\n".join(lines))
    random.Random(3).shuffle(lines)
    before = {"held_out.jsonl": lines[:8], "prompts.jsonl": lines[8:28]}
    for name, part in before.items():
        (tmp_path / name).write_text("".join(line + "\n" for line in part))
    texts = {name: (tmp_path / name).read_text() for name in before}
    shared_out(tmp_path, tmp_path / "mine.jsonl", rows=20, seed=3)
    assert {name: (tmp_path / name).read_text() for name in before} == texts
    (tmp_path / "held_out.jsonl").unlink()
    again = shared_out(tmp_path, tmp_path / "mine.jsonl", rows=20, seed=3)
    assert str(again[1]) == str([json.loads(line) for line in lines[:8]])
    assert (tmp_path / "prompts.jsonl").read_text() == texts["prompts.jsonl"]


@pytest.mark.parametrize("content", [b"\xff\xfe{\x00", b'{"prompt": "caf\xe9"}\n', b"PAR1", b""])
def test_what_is_no_prompts_is_not_replaced_unasked_either(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(content)
    with pytest.raises(UserError) as refused:
        write_prompts(tmp_path, given=None, domain="narrow", rows=9, held_out=8, seed=0)
    assert refused.value.code == "other-prompts"
    assert (tmp_path / "prompts.jsonl").read_bytes() == content


def test_every_format_of_synth_is_read(tmp_path: Path) -> None:
    rows = [
        {"id": f"q{i}", "prompt": f"one\u2028two\u0085{i}", "at": "\ud800" * (i == 3)}
        for i in range(20)
    ]
    plain = "".join(json.dumps(row, ensure_ascii=row["id"] == "q3") + "\n" for row in rows)
    files = [tmp_path / name for name in ("bom.jsonl", "mine.jsonl.gz", "mine.json", "m.parquet")]
    files[0].write_text("\ufeff" + plain)
    files[1].write_bytes(gzip.compress(plain.encode()))
    files[2].write_text(json.dumps(rows))
    day = pa.scalar(0, pa.timestamp("s")).as_py()  # no JSON, and nobody reads it
    pq.write_table(pa.Table.from_pylist([{**row, "at": day} for row in rows]), files[3])
    found = [shared_out(tmp_path / file.name.replace(".", "-"), file) for file in files]
    asked = [[[(row["id"], row["prompt"]) for row in part] for part in each] for each in found]
    assert len(asked[0][0]) == 12
    assert all(each == asked[0] for each in asked)


BROKEN = [
    "{half",
    "[1, 2]",
    '"text"',
    '{"foo": 1}',
    '{"prompt": "a", "prompt": "b"}',
    '{"a":' * 100_000,
]


@pytest.mark.parametrize("broken", BROKEN, ids=[row[:20] for row in BROKEN])
def test_a_row_that_is_no_prompt_is_named(tmp_path: Path, broken: str) -> None:
    given = tmp_path / "mine.jsonl"
    rows = [json.dumps({"prompt": f"p{i}"}) for i in range(30)]
    given.write_text("\n".join([*rows[:6], broken, *rows[6:]]))
    with pytest.raises(UserError, match="line 7") as refused:
        write_prompts(tmp_path, given=given, domain="narrow", rows=9, held_out=8, seed=0)
    assert refused.value.code == "prompts-unreadable"
