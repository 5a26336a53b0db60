# SPDX-License-Identifier: Apache-2.0
"""A server with the manners of vLLM's and no model: what a client costs, and how it takes faults.

`python -m tests.loopback FOLDER` listens on a free port and writes it to FOLDER/port. The words of the
last user message decide what happens:

    busy     429 twice, then an answer          broken   500, always
    long     400, too long (longer: other words)  slow     no answer for a minute
    die      the process ends, the first time
"""

import asyncio
import collections
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

from stages.synth.endpoints import PROBE

ROOT = Path(__file__).resolve().parents[1]

ANSWER_IDS = [7, 8, 2]
MAX_LENGTH_TOKENS = 4096


def _ids(messages: list[dict[str, Any]]) -> list[int]:
    """Prefix-stable: every message becomes its bytes and a 2; answers are `ANSWER_IDS`."""
    ids: list[int] = []
    for message in messages:
        said = message["role"] == "assistant"
        ids += ANSWER_IDS if said else [*(message["content"] or "").encode(), 2]
    return ids


class Loopback:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.busy: collections.Counter[str] = collections.Counter()

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        word = body["messages"][-1]["content"]
        self.busy[word] += 1
        if "busy" in word and self.busy[word] <= 2:
            return web.json_response({"error": {"message": "busy"}}, status=429)
        if "broken" in word:
            # Some servers repeat what they were sent, the key with it.
            text = f"broken: {request.headers.get('Authorization')}"
            return web.json_response({"error": {"message": text}}, status=500)
        if "long" in word:
            text = "This model's maximum context length is 8 tokens."
            if "longer" in word:  # vLLM's engine has other words for it than its front end
                text = "The decoder prompt is longer than the maximum model length of 8."
            return web.json_response({"error": {"message": text}}, status=400)
        if "slow" in word:
            await asyncio.sleep(60)
        if "die" in word and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os._exit(1)
        ids = _ids(body["messages"])
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "said"},
            "finish_reason": "stop",
            "token_ids": ANSWER_IDS,
        }
        usage = {"prompt_tokens": len(ids), "completion_tokens": 3, "total_tokens": len(ids) + 3}
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
            "prompt_token_ids": ids,
        }
        return web.json_response(answer)

    async def models(self, request: web.Request) -> web.Response:
        served = {"id": "loopback", "max_model_len": MAX_LENGTH_TOKENS}
        return web.json_response({"object": "list", "data": [served]})

    async def tokenize(self, request: web.Request) -> web.Response:
        # Whatever the test says the target's tokenizer gives.
        ids = [int(word) for word in (self.folder / "tokens").read_text().split()]
        return web.json_response({"tokens": ids})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_get("/health", self.health)
        return app


async def _serve(folder: Path) -> None:
    runner = web.AppRunner(Loopback(folder).app())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    (folder / "port.new").write_text(str(port))
    (folder / "port.new").rename(folder / "port")
    await asyncio.Event().wait()


@contextlib.contextmanager
def loopback(folder: Path, target: Path) -> Iterator[str]:
    """The server in a process of its own, with the ids that `target`'s tokenizer gives the probe."""
    # Here, not above: the server itself is to start at once.
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    encoded = AutoTokenizer.from_pretrained(target).apply_chat_template(
        PROBE, add_generation_prompt=True, return_dict=True
    )
    (folder / "tokens").write_text(" ".join(map(str, encoded["input_ids"])))
    (folder / "port").unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, "-m", "tests.loopback", str(folder)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "port").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{(folder / 'port').read_text()}"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
