# SPDX-License-Identifier: Apache-2.0
"""Prompts for the pretrained target: enough of them, and none held out that was trained on."""

import collections
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import UserError
from shared.prompts.rows import Prompt, parse_row
from stages.demo.real import written as templates
from stages.demo.real.prompts import OWN, Asked, choose_prompts, write_prompts
from stages.demo.real.written import KINDS, Domain, _part, written


def make(folder: Path, given: Path | str = OWN, *, overwrite: bool = False, **changes: Any) -> None:
    """The prompts of `given` in `folder`."""
    wanted = {"domain": "narrow", "rows": 400, "held_out": 8, "seed": 0, **changes}
    asked = Asked(given=str(given), workspace=folder, **wanted)
    if chosen := choose_prompts(folder, asked, overwrite=overwrite):
        write_prompts(folder, chosen)


def read(path: Path) -> list[Prompt]:
    return [parse_row(json.loads(line)) for line in path.open()]


def shared_out(folder: Path, given: Path | str, **changes: Any) -> list[list[Prompt]]:
    """[to train on, held out]."""
    make(folder, given, **changes)
    return [read(folder / name) for name in ("prompts.jsonl", "held_out.jsonl")]


def question(prompt: Prompt) -> str:
    text: str = prompt.conversation[0]["content"]
    return text


@pytest.mark.parametrize("domain", ["narrow", "broad"])
def test_five_thousand_distinct_prompts_by_seed(domain: Domain) -> None:
    rows = written(domain, 5000, seed=0, is_held_out=False)
    assert rows == written(domain, 5000, seed=0, is_held_out=False)
    assert len({question(row) for row in rows}) == 5000
    assert rows != written(domain, 5000, seed=1, is_held_out=False)


def test_a_kind_that_has_no_more_prompts_is_left_out_and_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"problem": ["p {a} {b} {c}"], "instruction": ["i {a}"], "code": ["c {a}"]}
    monkeypatch.setattr(templates, "KINDS", kinds)
    rows = written("broad", 90, seed=0, is_held_out=False)
    assert len({question(row) for row in rows}) == len({row.sample_id for row in rows}) == 90
    of_kind = collections.Counter(row.category for row in rows)
    assert of_kind == {"problem": 56, "instruction": 17, "code": 17}  # 3 to 19
    assert [message.rpartition(" after ")[0] for message in caplog.messages] == [
        "no new instruction is found",
        "no new code is found",
    ]
    monkeypatch.setitem(kinds, "problem", ["p"])
    assert len(written("narrow", 9, seed=0, is_held_out=False)) == 1


def test_held_out_prompts_share_no_template() -> None:
    for each in KINDS.values():
        training, held_out = _part(each, False), _part(each, True)
        assert set(training) | set(held_out) == set(each)
        assert len(held_out) >= 2
        assert not set(training) & set(held_out)


def test_a_users_rows_are_shared_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = in_file(tmp_path / "mine.jsonl", [{"prompt": f"p{i}"} for i in range(30)])
    training, held_out = shared_out(tmp_path, given)
    assert (len(training), len(held_out)) == (22, 8)
    assert {question(each) for each in (*training, *held_out)} == {f"p{i}" for i in range(30)}
    assert not caplog.records
    make(tmp_path, given, rows=20, overwrite=True)
    assert "2 of 30 rows are not used" in caplog.text
    with pytest.raises(UserError) as refused:
        make(tmp_path, given, held_out=16)
    assert refused.value.code == "prompts-too-few"


def test_prompts_of_an_earlier_run_are_not_replaced_unasked(tmp_path: Path) -> None:
    make(tmp_path, rows=20)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name for path in before} == {"prompts.jsonl", "held_out.jsonl", "prompts.json"}
    make(tmp_path, rows=20)
    for other in ({"seed": 1}, {"held_out": 9}):
        with pytest.raises(UserError) as refused:
            make(tmp_path, **{"rows": 20, **other})
        assert refused.value.code == "other-prompts"
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    make(tmp_path, rows=20, seed=1, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} != before


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"id": f"q{i}", "prompt": f"What is {i}?"} for i in range(count)]


def in_file(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_no_prompt_is_on_both_sides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "id": f"{row['id']}-{i}"} for i in range(3) for row in rows_of(40)]
    training, held_out = shared_out(tmp_path, in_file(tmp_path / "mine.jsonl", rows))
    asked = [[question(each) for each in part] for part in (training, held_out)]
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
    first = [{question(each) for each in part} for part in (training, held_out)]
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
    make(tmp_path, tmp_path / "mine.jsonl", rows=20, seed=3)
    assert {name: (tmp_path / name).read_text() for name in before} == texts
    (tmp_path / "held_out.jsonl").unlink()
    again = shared_out(tmp_path, tmp_path / "mine.jsonl", rows=20, seed=3)
    assert again[1] == [parse_row(json.loads(line)) for line in lines[:8]]
    assert (tmp_path / "prompts.jsonl").read_text() == texts["prompts.jsonl"]


@pytest.mark.parametrize("content", [b"\xff\xfe{\x00", b'{"prompt": "caf\xe9"}\n', b"PAR1", b""])
def test_what_is_no_prompts_is_not_replaced_unasked_either(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(content)
    with pytest.raises(UserError) as refused:
        make(tmp_path, rows=9)
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
    asked = [[[(row.sample_id, question(row)) for row in part] for part in each] for each in found]
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
        make(tmp_path / "out", given, rows=9)
    assert refused.value.code == "prompts-no-prompt"


def test_what_synth_reads_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder, a glob; relative to the workspace first."""
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = rows_of(40)
    in_file(folder / "a.jsonl", rows[:20])
    in_file(folder / "b.jsonl", rows[20:])
    (folder / "notes.txt").write_text("none of them")
    for number, given in enumerate(("mine", "mine/*.jsonl", folder)):
        out = tmp_path / f"out-{number}"
        asked = Asked(str(given), tmp_path, domain="narrow", rows=400, held_out=8, seed=0)
        chosen = choose_prompts(out, asked)
        assert chosen
        assert list(map(len, chosen.sides)) == [32, 8]
    assert caplog.text.count("files that are not read: notes.txt") == 2
    with pytest.raises(UserError, match="several files are a folder or a glob") as refused:
        make(tmp_path / "out", "mine/a.jsonl mine/b.jsonl")
    assert refused.value.code == "prompts-not-found"


def test_the_record_says_where_the_prompts_came_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = in_file(tmp_path / "mine.jsonl", rows_of(30))
    with caplog.at_level("INFO"):
        make(tmp_path, given)
        make(tmp_path, given)
    assert f"22 prompts to train on and 8 held out, of {given}" in caplog.text
    assert f"the prompts in {tmp_path} are kept, of {given}" in caplog.messages
    record = json.loads((tmp_path / "prompts.json").read_text())
    assert record["taken_from"] == [str(given)]
    for damaged in ("{", "[]", '{"asked": 1}'):
        (tmp_path / "prompts.json").write_text(damaged)
        make(tmp_path, given)
        assert json.loads((tmp_path / "prompts.json").read_text()) == record
    with (tmp_path / "held_out.jsonl").open("a") as edited:
        edited.write('{"prompt": "another"}')
    with pytest.raises(UserError) as refused:
        make(tmp_path, given)
    assert refused.value.code == "other-prompts"
