# SPDX-License-Identifier: Apache-2.0
"""The logs of a vLLM server, under any name: their chats, but only those that the run can render."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from shared.errors import UserError
from stages.ops.adapt import traffic

OFF = {"enable_thinking": False}


def chat(n: int, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": f"q{n}"}], **fields}


def chats(count: int, **fields: Any) -> list[Any]:
    return [chat(n, **fields) for n in range(count)]


def log_text(bodies: list[Any]) -> bytes:
    lines = [b"(APIServer pid=7) INFO 11-28 10:00:00 [loggers.py:1] Engine 000: idle"]
    for number, body in enumerate(bodies):
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        where = b"(APIServer pid=7) DEBUG 11-28 10:00:01 [request_logger.py:74]"
        lines.append(where + f" Request chatcmpl-{number} JSON body: ".encode() + text)
    return b"\n".join(lines) + b"\n"


def log_of(folder: Path, bodies: list[Any], name: str = "server.log") -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    text = log_text(bodies)
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return name


def split(folder: Path, name: str, **options: Any) -> traffic.Split:
    settings = {"max_rows": 1000, "template_kwargs": {}, **options}
    return traffic.split(name, folder, folder / "out", **settings)


def left_out(folder: Path, *bodies: Any, caplog: pytest.LogCaptureFixture, **options: Any) -> str:
    """What the log says of the requests that are left out, beside fifty that are taken."""
    with caplog.at_level(logging.INFO):
        split(folder, log_of(folder, [*chats(50), *bodies]), **options)
    return caplog.records[-1].getMessage().partition("left out")[2].strip(" ()")


def test_a_servers_log_gives_its_chats(tmp_path: Path) -> None:
    bodies = [*chats(50), {"prompt": "a completion"}, b'{"messages": [{"role": "us']
    bodies += [chat(51, chat_template_kwargs=OFF)]
    found = split(tmp_path, log_of(tmp_path, bodies))
    assert found.counts == {"train": 42, "held_out": 8, "left_out": 3}
    assert json.loads(found.train.read_text().splitlines()[0])["id"].startswith("log-")


def test_requests_of_another_template_are_refused_where_most_are(tmp_path: Path) -> None:
    name = log_of(tmp_path, chats(50, chat_template_kwargs=OFF))
    with pytest.raises(
        UserError, match=r"50 other_template; for example.*enable_thinking"
    ) as refused:
        split(tmp_path, name)
    assert refused.value.code == "traffic-unusable"
    same = split(tmp_path, name, template_kwargs={**OFF, "thinking": False})
    assert same.counts["left_out"] == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "high"},
        {"reasoning_effort": "none"},
        {"chat_template": "{{ messages }}"},
        {"documents": [{"title": "t", "text": "x"}]},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"add_generation_prompt": False},
        {"add_special_tokens": True},
        {"truncate_prompt_tokens": 100},
    ],
)
def test_fields_that_change_the_prompt_are_another_template(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
) -> None:
    found = left_out(tmp_path, chat(50, **fields), caplog=caplog)
    assert found == "1 other_template"


def test_fields_that_leave_the_prompt_as_it_is_are_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"reasoning_effort": None, "documents": [], "response_format": {"type": "json_object"}}
    fields |= {"chat_template_kwargs": None, "continue_final_message": False, "temperature": 1}
    assert left_out(tmp_path, chat(50, **fields), caplog=caplog) == ""


def test_a_reasoning_effort_is_what_vllm_makes_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [chat(50, reasoning_effort="none"), chat(51, reasoning_effort="low")]
    asked += [chat(52, reasoning_effort="none", chat_template_kwargs={"enable_thinking": True})]
    reads = {"messages", "enable_thinking"}  # and no reasoning_effort
    found = left_out(tmp_path, *asked, caplog=caplog, template_kwargs=OFF, variables=reads)
    assert found == "2 other_template"


def test_switches_that_the_template_does_not_read_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [chat(50, chat_template_kwargs=OFF), chat(51, reasoning_effort="high")]
    asked += [chat(52, documents=[{"text": "x"}])]
    assert left_out(tmp_path, *asked, caplog=caplog, variables={"messages"}) == ""


@pytest.mark.parametrize("own", ["x", ["x"], 1])
def test_template_variables_that_are_none_cost_their_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, own: Any
) -> None:
    found = left_out(tmp_path, chat(50, chat_template_kwargs=own), caplog=caplog)
    assert found == "1 broken_body"


def test_requests_that_leave_a_switch_of_the_run_to_the_server_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bodies = [*chats(50), *(chat(n, chat_template_kwargs=OFF) for n in range(50, 60))]
    split(tmp_path, log_of(tmp_path, bodies), template_kwargs={**OFF, "thinking": False})
    assert "50 of 60 chats leave enable_thinking, thinking to the server" in caplog.text
    caplog.clear()
    split(tmp_path, log_of(tmp_path, bodies))
    assert "to the server" not in caplog.text


def test_several_models_in_one_log_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split(tmp_path, log_of(tmp_path, [*chats(50), *chats(9, model="sql-lora")]))
    assert "several models: m (50), sql-lora (9); all" in caplog.text
    assert "adapter" in caplog.text


def test_bytes_that_are_not_utf8_cost_their_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = json.dumps(chat(50)).encode().replace(b"q50", b"caf\xe9")
    assert left_out(tmp_path, broken, caplog=caplog) == "1 not_utf8"


def test_requests_that_are_no_chats_do_not_make_a_log_unusable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = [{"prompt": f"complete {n}"} for n in range(120)]
    assert left_out(tmp_path, *others, caplog=caplog) == "120 no_chat"
    with pytest.raises(UserError, match=r"found 0.*120 no_chat") as refused:
        split(tmp_path, log_of(tmp_path, others))
    assert refused.value.code == "traffic-too-small"


@pytest.mark.parametrize(
    "name", ["x.log", "x.log.1", "x.log.2.gz", "x.log.gz", "X.LOG", "x.txt", "output", "day-1.out"]
)
def test_a_log_is_one_by_what_it_holds(tmp_path: Path, name: str) -> None:
    assert split(tmp_path, log_of(tmp_path, chats(50), name)).counts["left_out"] == 0


@pytest.mark.parametrize("given", ["logs", "logs/server*"])
def test_several_logs_are_one_traffic(tmp_path: Path, given: str) -> None:
    every = chats(90)
    log_of(tmp_path, every[:50], "logs/server.log.1.gz")
    log_of(tmp_path, every[40:], "logs/server.log")
    log_of(tmp_path, [], "logs/server.log.2")
    found = split(tmp_path, given)
    assert found.counts == {"train": 81, "held_out": 9, "left_out": 10}
    one = split(tmp_path, log_of(tmp_path, every))
    assert one.counts == {"train": 81, "held_out": 9, "left_out": 0}


def test_a_log_beside_others_is_read_whole_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_of(tmp_path, chats(50), "logs/server.log")
    other = json.dumps({"msg": "idle"}).encode() + b"\n"
    late = tmp_path / "logs/late.log"
    late.write_bytes(200 * other + log_text([chat(n) for n in range(50, 60)]))
    (tmp_path / "logs/proxy.log").write_bytes(other)
    assert split(tmp_path, "logs").counts == {"train": 52, "held_out": 8, "left_out": 0}
    assert "without a request in it: proxy.log" in caplog.text
    assert "late.log" not in caplog.text


def test_json_lines_of_any_name_are_no_log(tmp_path: Path) -> None:
    for name in ("rows.txt", "rows"):
        (tmp_path / name).write_text("\n".join(json.dumps(each) for each in chats(50)))
        assert split(tmp_path, name).counts["left_out"] == 0


@pytest.mark.parametrize("name", ["server.log", "server", "logs/a.log"])
def test_a_log_without_requests_is_refused(tmp_path: Path, name: str) -> None:
    log_of(tmp_path, [], name)
    with pytest.raises(UserError) as refused:
        split(tmp_path, name.partition("/")[0])
    assert refused.value.code == "log-without-requests"


def test_what_only_bears_the_name_of_a_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(gzip.compress(b"text"))
    (tmp_path / "b.log.gz").write_bytes(gzip.compress(log_text(chats(50)))[:200])
    for name, found in (("a.log", "a file that gzip compressed"), ("b.log.gz", "ended before")):
        with pytest.raises(UserError, match=found) as refused:
            split(tmp_path, name)
        assert refused.value.code == "prompts-unreadable"
