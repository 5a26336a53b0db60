# SPDX-License-Identifier: Apache-2.0
"""The client against servers that are busy, or no vLLM: real HTTP, canned texts."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from shared.errors import RetryableError, UserError
from shared.vllm.http import Address
from shared.vllm.measured_rows import Conversation
from stages.bench.measure import client
from stages.bench.measure.client import Server
from stages.bench.measure.loads import Load
from tests.quick.bench.measure.test_exposition import TEXT

IDLE = TEXT.replace('model_name="target"} 1.0', 'model_name="target"} 0.0').replace(
    "} 2.0", "} 0.0"
)


class Canned(http.server.ThreadingHTTPServer):
    """Answers each path with the next of its texts, and goes on with the last."""

    def __init__(self, **texts: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.texts = texts
        self.keys: list[str | None] = []
        self.bodies: list[dict[str, Any]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Canned

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        texts = self.server.texts.get(self.path.rsplit("/", 1)[-1])
        self.send_response(200 if texts else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if texts:
            self.wfile.write(texts.pop(0).encode() if len(texts) > 1 else texts[0].encode())

    def do_POST(self) -> None:
        """The first half of a streamed answer, and whatever text is to follow it."""
        self.server.keys.append(self.headers["Authorization"])
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        choice = {"index": 0, "delta": {"content": "ha"}, "finish_reason": None, "token_ids": [7]}
        chunk = {"id": "x", "created": 0, "model": "m", "object": "chat.completion.chunk"}
        chunk |= {"prompt_token_ids": [1], "choices": [choice]}
        (rest,) = self.server.texts.get("completions", [""])
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n{rest}".encode())

    def log_message(self, *args: object) -> None:
        """Quiet."""


MODELS = json.dumps(
    {"object": "list", "data": [{"id": "m", "object": "model", "max_model_len": 64}]}
)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.setattr(client, "_SETTLE_S", 60.0)  # only who never comes to rest takes as long
    running: list[Canned] = []

    def start(**texts: list[str]) -> Server:
        canned = Canned(**texts)
        threading.Thread(target=canned.serve_forever, daemon=True).start()
        running.append(canned)
        address = f"http://127.0.0.1:{canned.server_address[1]}/v1/"
        server = Server(Address(address, "key"), request_timeout_s=60)
        server.canned = canned  # type: ignore[attr-defined]
        return server

    yield start
    for canned in running:
        canned.shutdown()
        canned.server_close()


def test_what_it_serves_and_the_key_is_sent(serve) -> None:  # type: ignore[no-untyped-def]
    server = serve(models=[MODELS], metrics=[IDLE])  # and no /version, as behind a proxy
    assert server.connect() == "unknown"
    assert (server.model, server.max_model_len) == ("m", 64)
    assert set(server.canned.keys) == {"Bearer key"}
    assert (
        serve(models=[MODELS], metrics=[IDLE], version=['{"version": "0.32.0"}']).connect()
        == "0.32.0"
    )


def test_a_busy_server_is_to_be_measured_later(  # type: ignore[no-untyped-def]
    serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_SETTLE_S", 0.2)
    with pytest.raises(RetryableError, match="3 requests still running and 0 answers"):
        serve(metrics=[TEXT]).read_idle()


ASKED = Conversation("a", "", (({"role": "user", "content": "Why?"},),))


def test_half_an_answer_is_none(serve) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RetryableError, match="ended an answer in its middle"):
        serve(metrics=[IDLE]).play([ASKED], Load(1, 0.0, 8), max_tokens=8)


def test_an_error_inside_an_answer_is_told_and_may_be_tried_again(serve) -> None:  # type: ignore[no-untyped-def]
    """vLLM has said 200 by then, so it sends the error as a chunk."""
    error = {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}
    server = serve(completions=[f"data: {json.dumps(error)}\n\ndata: [DONE]\n\n"])
    with pytest.raises(RetryableError, match=r"in its middle \(EngineCore died\)\. Its log says"):
        server.play([ASKED], Load(1, 0.0, 8), max_tokens=8)


def test_a_server_that_comes_to_rest_is_waited_for(serve) -> None:  # type: ignore[no-untyped-def]
    assert serve(metrics=[TEXT, TEXT, IDLE]).read_idle().unfinished == 0


def test_somebody_elses_answers_between_two_readings(serve) -> None:  # type: ignore[no-untyped-def]
    server = serve(metrics=[IDLE])  # it has ended 7 requests in all
    assert server.read_idle(answered=7).answered == 7
    with pytest.raises(RetryableError, match="2 answers to others"):
        server.read_idle(answered=5)


def test_what_is_no_vllm(serve) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="bench measures vLLM servers"):
        serve(models=[MODELS], metrics=["up 1\n"]).connect()
    with pytest.raises(UserError, match="404"):
        serve(models=[MODELS]).connect()


def test_a_long_answer_is_read_whole_and_the_template_gets_its_switches(serve) -> None:  # type: ignore[no-untyped-def]
    """A line of a stream may hold the ids of a whole long prompt."""
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "token_ids": [8]}]}
    first = {"prompt_token_ids": list(range(100_000)), "choices": []}
    lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in (first, end))
    server = serve(completions=[f"{lines}data: [DONE]\n\n"])
    server._template_kwargs = {"enable_thinking": False}
    answered: list[bool] = []
    told = functools.partial(answered.append, True)
    (row,) = server.play([ASKED], Load(1, 0.5, 8), max_tokens=8, on_answered=told)
    assert answered == [True]
    assert row["token_ids"] == [7, 8]
    assert len(row["prompt_token_ids"]) == 100_000
    (body,) = server.canned.bodies
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.5, 1.0, -1)
    assert "Bearer key" in server.canned.keys
