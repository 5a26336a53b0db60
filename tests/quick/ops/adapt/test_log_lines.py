# SPDX-License-Identifier: Apache-2.0
"""Logs as collectors write them, and files of requests: the same chats as in the server's own log."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import UserError
from stages.ops.adapt.log_lines import bodies
from tests.quick.ops.adapt.test_server_log import chat, chats, left_out, log_text, split

IDLE = "(APIServer pid=7) INFO 11-28 10:00:00 [loggers.py:1] Engine 000: idle"
PIECE = 16 << 10
LONG = [chat(n, user="x" * (n * 1000)) for n in range(60)]


def server_lines(asked: list[Any]) -> list[str]:
    return log_text(asked).decode().splitlines()


def docker(line: str) -> str:
    """As Docker's json-file splits and writes a line."""
    pieces = [line[at : at + PIECE] for at in range(0, len(line), PIECE)]
    pieces[-1] += "\n"
    records = [{"log": each, "stream": "stderr", "time": "2026-11-30T10:00:00Z"} for each in pieces]
    return "\n".join(map(json.dumps, records))


def cri(line: str) -> str:
    pieces = [line[at : at + PIECE] for at in range(0, len(line), PIECE)]
    tags = ["P"] * (len(pieces) - 1) + ["F"]
    return "\n".join(
        f"2026-11-30T10:00:00.1Z stderr {t} {p}" for t, p in zip(tags, pieces, strict=True)
    )


def journald(line: str) -> str:
    size = 48 << 10
    pieces = [line[at : at + size] for at in range(0, len(line), size)]
    records: list[dict[str, Any]] = [{"MESSAGE": each, "_PID": "7"} for each in pieces]
    for each in records[:-1]:
        each["_LINE_BREAK"] = "line-max"
    return "\n".join(map(json.dumps, records))


def vllm_json(line: str) -> str:
    return json.dumps({"asctime": "2026-11-30", "levelname": "DEBUG", "message": line})


def coloured(line: str) -> str:
    return f"\x1b[0;36m(APIServer pid=7)\x1b[0;0m \x1b[37mDEBUG\x1b[0m {line}\x1b[0m"


def filebeat(line: str) -> str:
    about = {"input": {"type": "container"}, "log": {"offset": 1}, "stream": "stderr"}
    return json.dumps({"@timestamp": "2026", **about, "message": line})


FORMS: dict[str, Callable[[str], str]] = {
    "coloured": coloured,
    "docker": docker,
    "cri": cri,
    "journald": journald,
    "journald, coloured": lambda line: json.dumps({"MESSAGE": list(coloured(line).encode())}),
    "vllm json": vllm_json,
    "vllm json in docker": lambda line: docker(vllm_json(line)),
    "vllm json in cri": lambda line: cri(vllm_json(line)),
    "filebeat": filebeat,
    "fluent-bit": lambda line: json.dumps({"log": line, "stream": "stderr", "logtag": "F"}),
    "a shipper without line breaks": lambda line: json.dumps({"log": line}),
}


@pytest.mark.parametrize(
    ("form", "name"),
    [*((form, "x-json.log") for form in FORMS), ("docker", "x.jsonl"), ("journald", "x")],
)
def test_every_collector_s_log_is_read(tmp_path: Path, form: str, name: str) -> None:
    plain = tmp_path / "plain.log"
    plain.write_bytes(log_text(LONG))
    expected = split(tmp_path, "plain.log").train.read_text()
    (tmp_path / name).write_text("\n".join(map(FORMS[form], server_lines(LONG))) + "\n")
    found = split(tmp_path, name)
    assert found.counts == {"train": 52, "held_out": 8, "left_out": 0}
    assert found.train.read_text() == expected


@pytest.mark.parametrize("field", ["body", "request"])
@pytest.mark.parametrize("name", ["batch.jsonl", "batch.txt"])
def test_files_of_requests_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, field: str, name: str
) -> None:
    asked = [*chats(60), {"prompt": "a completion"}, chat(60, reasoning_effort="high")]
    rows = [{"custom_id": f"r{n}", "method": "POST", field: each} for n, each in enumerate(asked)]
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.INFO):
        assert split(tmp_path, name).counts == {"train": 52, "held_out": 8, "left_out": 2}
    assert "1 no_chat, 1 other_template" in caplog.text


@pytest.mark.parametrize("field", ["message", "log", "MESSAGE", "request", "body"])
def test_rows_with_a_field_of_that_name_are_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, field: str
) -> None:
    quoted = server_lines([chat(1)])[-1]
    value = chat(2) if field in ("request", "body") else quoted
    rows = [{"id": f"r{n}", "prompt": f"q{n}", field: value} for n in range(60)]
    for name in ("rows.jsonl", "rows.txt"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        found = split(tmp_path, name)
        assert found.counts["left_out"] == 0
        assert json.loads(found.train.read_text().splitlines()[0])["id"].startswith("r")


def test_what_a_collector_lost_costs_its_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ended = '{"log": "Request a JSON body: {\\"messages\\": [", "stream": "stderr"}'
    assert left_out(tmp_path, caplog=caplog) == ""
    lines = list(map(docker, server_lines([*chats(50), chat(50, user="x" * 40_000)])))
    last = lines.pop().splitlines()
    halved = [each.replace('xx"', '\\ufffd"', 1) for each in last[:1]]  # the end of its piece
    more = [last[0], *lines[:2], *halved, *last[1:], ended, '{"MESSAGE": null}']
    (tmp_path / "x.log").write_text("\n".join([*lines, *more]))
    with caplog.at_level(logging.INFO):
        split(tmp_path, "x.log")
    assert caplog.messages[-1].endswith("(3 cut_off, 1 duplicate_id, 1 not_utf8)")


def test_a_piece_that_is_whole_is_not_joined() -> None:
    whole = f"Request a JSON body: {json.dumps(chat(1, user='x' * PIECE))}"
    cut = f'Request b JSON body: {{"messages": "{"y" * PIECE}'
    lines = [json.dumps({"log": each}).encode() for each in (whole, IDLE, cut, whole, cut)]
    kinds = [(number, isinstance(found, dict)) for number, found in bodies(lines)]
    assert kinds == [(1, True), (3, False), (4, True), (5, False)]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([b'{"messages": [{"role": "us'] * 50, "without --max-log-len"),
        (chats(50, reasoning_effort="high"), "run.chat_template_kwargs"),
        ([{"messages": [{"role": "wizard", "content": str(n)}]} for n in range(50)], "#adapt"),
    ],
)
def test_the_remedy_fits_what_is_wrong(tmp_path: Path, asked: list[Any], words: str) -> None:
    (tmp_path / "x.log").write_bytes(log_text(asked))
    with pytest.raises(UserError) as refused:
        split(tmp_path, "x.log")
    assert refused.value.code == "traffic-unusable"
    assert words in refused.value.remedy
    assert ("--max-log-len" in refused.value.remedy) == ("--max-log-len" in words)
