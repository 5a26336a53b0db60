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


def rows_of(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(folder: Path, bodies: list[Any]) -> str:
    lines = ["(APIServer pid=7) INFO 11-28 10:00:00 [loggers.py:1] Engine 000: idle"]
    for number, body in enumerate(bodies):
        text = body if isinstance(body, str) else json.dumps(body)
        where = "(APIServer pid=7) DEBUG 11-28 10:00:01 [request_logger.py:74]"
        lines.append(f"{where} Request chatcmpl-{number} JSON body: {text}")
    (folder / "server.log").write_text("\n".join(lines))
    return "server.log"


def test_a_tenth_is_held_out_and_none_is_on_both_sides(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n % 150}", "category": "c"} for n in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = split(tmp_path, "rows.jsonl", max_rows=100)
    assert found.counts == {"train": 100, "held_out": 15, "left_out": 50}
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
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
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


def test_a_servers_log_gives_its_chats(tmp_path: Path) -> None:
    bodies: list[Any] = [{"model": "m", "messages": [ask(f"q{n}")]} for n in range(50)]
    bodies += [{"prompt": "a completion"}, '{"messages": [{"role": "us']
    bodies += [{"messages": [ask("q")], "chat_template_kwargs": {"enable_thinking": False}}]
    found = split(tmp_path, log_of(tmp_path, bodies))
    assert found.counts == {"train": 42, "held_out": 8, "left_out": 3}
    assert rows_of(found.train)[0]["id"].startswith("log-")


def test_requests_of_another_template_are_refused_where_most_are(tmp_path: Path) -> None:
    off = {"enable_thinking": False}
    name = log_of(
        tmp_path, [{"messages": [ask(f"q{n}")], "chat_template_kwargs": off} for n in range(50)]
    )
    with pytest.raises(UserError, match=r"other_template.: 50") as refused:
        split(tmp_path, name)
    assert refused.value.code == "traffic-unusable"
    same = split(tmp_path, name, template_kwargs={**off, "thinking": False})
    assert same.counts["left_out"] == 0


@pytest.mark.parametrize(
    ("bodies", "code"),
    [
        ([{"messages": [ask(f"q{n}")]} for n in range(39)], "traffic-too-small"),
        ([{"messages": [ask("q"), answer(f"{n}"), ask("r")]} for n in range(99)], "traffic-too-small"),
        ([], "log-without-requests"),
    ],
)  # fmt: skip
def test_too_little_is_refused(tmp_path: Path, bodies: Rows, code: str) -> None:
    with pytest.raises(UserError) as refused:
        split(tmp_path, log_of(tmp_path, bodies))
    assert refused.value.code == code
