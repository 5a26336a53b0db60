# SPDX-License-Identifier: Apache-2.0
"""vLLM's server without a model: what a stage asks it, answered at once and always alike.

In: vLLM's own options. Out: an answer is a function of what was asked, and so is the number of drafts
that were accepted for it, so that a disturbed run can be held to an undisturbed one. Costs a tenth of
a second to start. The surprise: while the file $STAND_IN_DROPS exists, connections are cut.
"""

import hashlib
import http.server
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

END = 2  # a token of its own behind every message
DELAY_S = float(os.environ.get("STAND_IN_DELAY_S", "0.02"))


def options(words: list[str]) -> dict[str, str]:
    """`--name value` and `--flag`, whatever their names."""
    found = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word[2:]] = "" if following.startswith("--") else following
    return found


def ids_of(messages: list[dict[str, Any]]) -> list[int]:
    """Every message becomes its bytes and an end: prefix-stable over turns."""
    return [token for m in messages for token in (*(m["content"] or "").encode(), END)]


def histogram(digest: bytes, num_tokens: int, depth: int) -> list[int]:
    """[depth + 1] counts of drafts with so many accepted tokens, for an answer of `num_tokens`."""
    counts, left, drafts = [0] * (depth + 1), num_tokens - 1, 0
    while left > 0:
        accepted = digest[drafts % len(digest)] % (depth + 1)
        counts[accepted] += 1
        left, drafts = left - 1 - accepted, drafts + 1
    return counts


class Engine(http.server.ThreadingHTTPServer):
    """What the server has counted since it started."""

    request_queue_size = 128

    def __init__(self, given: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", int(given["port"])), Handler)
        self.name = given.get("served-model-name", "stand-in")
        self.longest = int(given.get("max-model-len", "4096"))
        drafting = json.loads(given.get("speculative-config", "{}"))
        self.depth = int(drafting.get("num_speculative_tokens", 0))
        self.counting = threading.Lock()
        self.running = self.answered = 0
        self.drafted = [0] * (self.depth + 1)

    def handle_error(self, *_: object) -> None:
        """A client that is gone is no news."""

    def metrics(self) -> str:
        with self.counting:
            drafts = sum(self.drafted)
            reached = [sum(self.drafted[i:]) for i in range(1, self.depth + 1)]
            values = {"num_requests_running": self.running, "num_requests_waiting": 0}
            values['request_success_total{finished_reason="stop"}'] = self.answered
        if self.depth:
            values["spec_decode_num_drafts_total"] = drafts
            values["spec_decode_num_draft_tokens_total"] = drafts * self.depth
            values["spec_decode_num_accepted_tokens_total"] = sum(reached)
            label = "spec_decode_num_accepted_tokens_per_pos_total"
            values |= {f'{label}{{position="{i}"}}': n for i, n in enumerate(reached)}
        return "".join(f"vllm:{name} {value}.0\n" for name, value in values.items())


class Handler(http.server.BaseHTTPRequestHandler):
    server: Engine
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _is_cut(self) -> bool:
        if not Path(os.environ.get("STAND_IN_DROPS", "/nowhere")).exists():
            return False
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
        return True

    def _send(self, value: Any) -> None:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self._is_cut():
            return
        served = {"id": self.server.name, "object": "model", "max_model_len": self.server.longest}
        texts: dict[str, Any] = {
            "/health": "",
            "/metrics": self.server.metrics(),
            "/version": {"version": "0.0.0"},
            "/v1/models": {"object": "list", "data": [served]},
        }
        self._send(texts[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_cut():
            return
        if self.path == "/tokenize":
            tokens = Path(os.environ["STAND_IN_TOKENS"]).read_text().split()
            self._send({"tokens": [int(token) for token in tokens]})
            return
        with self.server.counting:
            self.server.running += 1
        try:
            self._answer(body)
        finally:
            with self.server.counting:
                self.server.running -= 1

    def _answer(self, body: dict[str, Any]) -> None:
        asked = ids_of(body["messages"])
        digest = hashlib.sha256(bytes(asked)).digest()
        text = digest.hex()[: 8 + digest[0] % 16]
        said = [*text.encode(), END]
        time.sleep(DELAY_S)
        if self._is_cut():
            return
        counts = histogram(digest, len(said), self.server.depth)
        with self.server.counting:
            self.server.answered += 1
            self.server.drafted = [a + b for a, b in zip(self.server.drafted, counts, strict=True)]
        common = {"id": "x", "created": 0, "model": body["model"], "prompt_token_ids": asked}
        if body.get("stream"):
            self._stream(common, text, said, counts)
            return
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "token_ids": said}
        self._send({**common, "object": "chat.completion", "choices": [choice]})

    def _stream(
        self, common: dict[str, Any], text: str, said: list[int], counts: list[int]
    ) -> None:
        drafted = {
            "acceptance_histogram": counts,
            "num_draft_tokens": sum(counts) * self.server.depth,
        }
        metrics = {"speculative_decoding": drafted} if self.server.depth else None
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        half = len(said) // 2
        parts = [(text[:half], said[:half], None), (text[half:], said[half:], "stop")]
        for content, tokens, finish in parts:
            delta = {"role": "assistant", "content": content}
            choice = {"index": 0, "delta": delta, "finish_reason": finish, "token_ids": tokens}
            more = {"metrics": metrics} if finish else {}
            chunk = {**common, **more, "object": "chat.completion.chunk", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            time.sleep(DELAY_S / 4)
            if self._is_cut():
                return
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    Engine(options(sys.argv[1:])).serve_forever()
