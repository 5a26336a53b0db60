# SPDX-License-Identifier: Apache-2.0
"""What the client sends, and what it makes of a refusal in vLLM's words: real HTTP."""

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.prompts.rows import parse_row
from shared.settings import build
from stages.synth.client import Client, Outcome
from stages.synth.config import SynthConfig
from stages.synth.endpoints import KEY_VARIABLE, PROBE, connect
from tests.models import tiny_tokenizer

LONGEST = 64
TOO_MANY = (
    "max_tokens={} cannot be greater than max_model_len=64. Please request fewer output tokens."
)


class Server(http.server.ThreadingHTTPServer):
    """One of `LONGEST` tokens that refuses longer answers, and everything once it has `words`."""

    def __init__(self, target: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = target
        probe = tiny_tokenizer(target).apply_chat_template(PROBE, add_generation_prompt=True)
        self.tokens = list(probe["input_ids"])
        self.words = ""
        self.max_tokens: list[int] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "m", "max_model_len": LONGEST}]}
        if path == "/tokenize":
            return 200, {"tokens": self.tokens}
        self.bodies.append(body)
        self.max_tokens.append(body["max_tokens"])
        if body["max_tokens"] > LONGEST:
            return 400, {"error": {"message": TOO_MANY.format(body["max_tokens"])}}
        if self.words:
            return 400, {"error": {"message": self.words.format(key=self.keys[-1])}}
        choice = {"message": {"content": "said"}, "finish_reason": "stop", "token_ids": [7, 2]}
        return 200, {"choices": [choice], "prompt_token_ids": [1, 5]}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict[str, Any]) -> None:
        self.server.keys.append(self.headers["Authorization"])
        status, answer = self.server.answer(self.path, body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def asked(server: Server, **flags: str) -> Outcome:
    """What becomes of one prompt."""
    url = f"http://127.0.0.1:{server.server_address[1]}"
    flags = {"max_length_tokens": str(LONGEST), "max_tokens": "16", **flags}
    config = build(SynthConfig, {"target": "t", "prompts": "p", "endpoints": url, **flags})
    endpoints = connect(config, server.target)

    async def answer() -> Outcome:
        client = Client(endpoints, config, ())
        try:
            return await client.answer(parse_row({"id": "a", "prompt": "hello"}))
        finally:
            await client.close()

    return asyncio.run(answer())


def refusal(server: Server, words: str) -> tuple[str, str]:
    server.words = words
    refused = asked(server).refused
    assert refused is not None
    return refused.reason, refused.detail


def test_no_more_tokens_are_asked_for_than_a_row_may_have(server: Server) -> None:
    for max_tokens in ("1024", "16"):
        assert asked(server, max_tokens=max_tokens).rows
    assert server.max_tokens == [LONGEST, 16]


def test_a_running_servers_own_sampling_does_not_apply(server: Server) -> None:
    """What vLLM takes from a target's generation_config.json where a request does not say it."""
    assert asked(server).rows
    plain = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert plain.items() <= server.bodies[0].items()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("This model's maximum context length is 64 tokens. However, your prompt", "too_long"),
        ("Input length (70) exceeds model's maximum context length (64).", "too_long"),
        (TOO_MANY.format(65), "refused_by_server"),
    ],
)
def test_only_a_prompt_is_too_long(server: Server, words: str, reason: str) -> None:
    assert refusal(server, words)[0] == reason


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_none_is_sent_and_nothing_is_replaced(
    server: Server, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if key is not None:
        monkeypatch.setenv(KEY_VARIABLE, key)
    said = '400: {"error": {"message": "none of your business: None"}}'
    assert refusal(server, "none of your business: {key}") == ("refused_by_server", said)
    assert server.keys == [None] * 3


def test_a_key_that_the_server_repeats_is_replaced(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "ek-61f0c2")
    _, said = refusal(server, "unknown: {key}, ek-61f0c2")
    assert said == '400: {"error": {"message": "unknown: Bearer (the key), (the key)"}}'
    assert server.keys == ["Bearer ek-61f0c2"] * 3
