# SPDX-License-Identifier: Apache-2.0
"""Traffic of any shape becomes rows to learn from and rows held out, and no chat is on both sides."""

import json
from pathlib import Path
from typing import Any

import pytest

from shared.errors import UserError
from shared.prompts.rows import Prompt, parse_row
from stages.ops.adapt import traffic

Rows = list[dict[str, Any]]


def ask(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def split(folder: Path, name: str, **options: Any) -> traffic.Split:
    settings = {"max_rows": 1000, "template_kwargs": {}, **options}
    return traffic.split(name, folder, folder / "out", **settings)


def write_rows(folder: Path, rows: Rows) -> None:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def rows_of(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_tenth_is_held_out_and_none_is_on_both_sides(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n % 150}", "category": "c"} for n in range(200)]
    write_rows(tmp_path, rows)
    found = split(tmp_path, "rows.jsonl", max_rows=100)
    assert found.counts == {"train": 100, "held_out": 15, "left_out": 85}  # 50 twice, 35 too many
    learnt, held = rows_of(found.train), rows_of(found.held_out)
    assert (len(learnt), len(held)) == (100, 15)
    texts = [{row["messages"][0]["content"] for row in side} for side in (learnt, held)]
    assert not texts[0] & texts[1]
    assert held[0]["category"] == "c"
    again = split(tmp_path, "rows.jsonl", max_rows=100)
    assert rows_of(again.held_out) == held


def test_chats_that_begin_alike_stay_on_one_side(tmp_path: Path) -> None:
    rows: Rows = []
    for n in range(60):
        opening = [ask(f"q{n // 2}"), answer("a"), ask(f"then {n}")]
        rows.append({"messages": opening})
    write_rows(tmp_path, rows)
    found = split(tmp_path, "rows.jsonl")
    openings = [
        {row["messages"][0]["content"] for row in rows_of(side)}
        for side in (found.train, found.held_out)
    ]
    assert openings[0] and openings[1] and not openings[0] & openings[1]


def prompt(*messages: dict[str, str]) -> Prompt:
    return parse_row({"messages": list(messages)}, source="t")


def test_only_the_longest_form_of_a_growing_chat_counts() -> None:
    first = prompt(ask("q1"))
    second = prompt(ask("q1"), answer("a1"), ask("q2"))
    forked = prompt(ask("q1"), answer("other"), ask("q2"))
    assert traffic.longest_forms([first, second, forked]) == [second, forked]


def test_marks_and_gaps_between_turns_are_kept(tmp_path: Path) -> None:
    bad = {**answer("bad"), "weight": 0}
    rows: Rows = [{"messages": [ask(f"q{n}"), bad, ask("more"), answer("good")]} for n in range(50)]
    rows += [{"turns": [f"first {n}", "second"]} for n in range(50)]
    write_rows(tmp_path, rows)
    found = split(tmp_path, "rows.jsonl")
    written = [parse_row(row) for side in (found.train, found.held_out) for row in rows_of(side)]
    assert len(written) == 100
    marked = [[turn.is_trained for turn in row.turns] for row in written if row.turns[0].answer]
    assert marked == [[False, True]] * 50
    assert all(row.turns[0].answer or len(row.turns) == 2 for row in written)


def test_chats_that_cannot_be_measured_are_trained_on(tmp_path: Path) -> None:
    write_rows(tmp_path, [{"prompt": f"question {n}"} for n in range(100)])
    plain = {
        row["messages"][0]["content"] for row in rows_of(split(tmp_path, "rows.jsonl").held_out)
    }
    unfit = sorted(plain)[:4]
    found = split(
        tmp_path, "rows.jsonl", fits=lambda each: each.messages[0]["content"] not in unfit
    )
    held = {row["messages"][0]["content"] for row in rows_of(found.held_out)}
    assert len(held) == 10 and not held & set(unfit)
    learnt = {row["messages"][0]["content"] for row in rows_of(found.train)}
    assert set(unfit) <= learnt


def test_where_hardly_any_can_be_measured_it_says_so(tmp_path: Path) -> None:
    write_rows(tmp_path, [{"prompt": f"question {n}"} for n in range(100)])
    with pytest.raises(UserError, match=r"0 can be held out.*100 do not fit") as refused:
        split(tmp_path, "rows.jsonl", fits=lambda _: False)
    assert refused.value.code == "traffic-too-small"
    assert "bench.max_tokens" in refused.value.remedy


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": f"q{n}"} for n in range(39)],
        [{"messages": [ask("q"), answer(f"{n}"), ask("r")]} for n in range(99)],
    ],
)
def test_too_little_is_refused(tmp_path: Path, rows: Rows) -> None:
    write_rows(tmp_path, rows)
    with pytest.raises(UserError) as refused:
        split(tmp_path, "rows.jsonl")
    assert refused.value.code == "traffic-too-small"
