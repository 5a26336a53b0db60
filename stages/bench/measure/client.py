# SPDX-License-Identifier: Apache-2.0
"""The client's side of a measurement: a closed loop of streamed chats, and `/metrics`.

In: a server's address, conversations, a load. Out: one row for each answer. Costs one core at most.
Times are this client's clock, from sending to the first and the last chunk that carries token ids, so
they include the queue and the network, as a user sees them. No request is retried: the server would
count a second attempt, and the client would not.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import aiohttp

from shared.errors import EyrieError, RetryableError, UserError
from shared.runtime.process import stop_if_requested
from shared.vllm.http import Address
from shared.vllm.measured_rows import Conversation, check_room
from stages.bench.figures.metrics import Counters
from stages.bench.lossless.divergence import TOP, Probe, Scored
from stages.bench.measure.exposition import Reading, parse
from stages.bench.measure.loads import Load

Row = dict[str, Any]

_SETTLE_S = 10.0
_POLL_S = 0.1
_LONGEST_LINE_BYTES = 1 << 26  # the first chunk carries the whole prompt's token ids
# The server's generation_config.json must not decide how the answers are sampled.
_PLAIN_SAMPLING = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class Server:
    """A vLLM server under measurement: what it serves, and how to ask it.

    Args:
        template_kwargs: `chat_template_kwargs` of every chat.
        depth: K, its draft length; 0 without a drafter.
    """

    def __init__(
        self,
        address: Address,
        *,
        request_timeout_s: float,
        template_kwargs: Mapping[str, Any] | None = None,
        depth: int = 0,
    ) -> None:
        self.address = address
        self._timeout_s = request_timeout_s
        self._template_kwargs = dict(template_kwargs or {})
        self._depth = depth
        self.model, self.max_model_len = "", 0

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        """A session of the running event loop; the transport's faults as ours."""
        session = aiohttp.ClientSession(
            headers=self.address.headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            read_bufsize=_LONGEST_LINE_BYTES,
        )
        try:
            async with session:
                yield session
        except (aiohttp.ClientPayloadError, json.JSONDecodeError) as error:
            raise self._cut(str(error)) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self.address.unreachable(error) from error

    def _cut(self, why: str) -> RetryableError:
        return RetryableError(
            f"the server at {self.address.base_url} ended an answer in its middle"
            + (f" ({self.address.hide_key(why)[:300]})." if why else "."),
            code="answer-cut",
            remedy="Its log says why; run the same command again.",
            facts={"url": self.address.base_url},
        )

    def connect(self) -> str:
        """Ask for the model that it serves; returns vLLM's version.

        Raises:
            RetryableError: it does not answer.
            UserError: it refuses the key, or is no vLLM.
        """
        models = self.address.json("/v1/models")
        served = models["data"][0] if isinstance(models, dict) and models.get("data") else {}
        self.model = str(served.get("id", ""))
        self.max_model_len = int(served.get("max_model_len") or 0)
        self.read()
        with contextlib.suppress(EyrieError, LookupError, TypeError):
            return str(self.address.json("/version")["version"])
        return "unknown"

    def read(self) -> Reading:
        """What `/metrics` says now.

        Raises:
            UserError: it is not vLLM's.
        """
        text = self.address.request("/metrics")
        try:
            return parse(text)
        except ValueError as error:
            raise UserError(
                f"{self.address.base_url}/metrics: expected vLLM's counters, found another text "
                f"({error}).",
                code="metrics-foreign",
                remedy="bench measures vLLM servers: give the address of vLLM's own server.",
                facts={"url": self.address.base_url},
            ) from error

    def read_idle(self, *, answered: int | None = None) -> Reading:
        """What it says once nothing runs any more, and `answered` requests have ended in all.

        Raises:
            RetryableError: somebody else uses the server.
        """
        deadline = time.monotonic() + _SETTLE_S
        while True:
            reading = self.read()
            settled = answered is None or reading.answered >= answered
            if (not reading.unfinished and settled) or time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        foreign = 0 if answered is None else reading.answered - answered
        if reading.unfinished or foreign:
            raise RetryableError(
                f"expected a server that nobody else uses at {self.address.base_url}, found "
                f"{reading.unfinished} requests still running and {foreign} answers to others.",
                code="server-not-idle",
                remedy="Measure it when it is idle.",
                facts={"url": self.address.base_url, "unfinished": reading.unfinished},
            )
        return reading

    def play(
        self,
        conversations: Sequence[Conversation],
        load: Load,
        *,
        max_tokens: int,
        on_answered: Callable[[], None] = lambda: None,
    ) -> list[Row]:
        """Every conversation, `load.concurrency` at a time; rows in the conversations' order.

        Args:
            on_answered: called after each conversation.
        """
        return asyncio.run(self._play(conversations, load, max_tokens, on_answered))

    async def _play(
        self,
        conversations: Sequence[Conversation],
        load: Load,
        max_tokens: int,
        on_answered: Callable[[], None],
    ) -> list[Row]:
        rows: list[list[Row]] = [[] for _ in conversations]
        waiting = iter(range(len(conversations)))

        async def worker(session: aiohttp.ClientSession) -> None:
            for index in waiting:
                await self._converse(session, conversations[index], load, max_tokens, rows[index])
                on_answered()

        async with self._session() as session:
            workers = [asyncio.create_task(worker(session)) for _ in range(load.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in workers:
                    task.cancel()
        return [row for conversation in rows for row in conversation]

    async def _converse(
        self,
        session: aiohttp.ClientSession,
        conversation: Conversation,
        load: Load,
        max_tokens: int,
        rows: list[Row],
    ) -> None:
        messages: list[Any] = []
        for turn, step in enumerate(conversation.steps):
            stop_if_requested("a measurement is only kept whole")
            messages += step
            row, text = await self._chat(session, conversation, messages, load, max_tokens)
            if self.max_model_len:
                tokens = len(row["prompt_token_ids"])
                check_room(conversation.id, tokens, max_tokens, self._depth, self.max_model_len)
            rows.append(
                {"id": conversation.id, "turn": turn, "category": conversation.category, **row}
            )
            messages.append({"role": "assistant", "content": text})

    async def _chat(
        self,
        session: aiohttp.ClientSession,
        conversation: Conversation,
        messages: list[Any],
        load: Load,
        max_tokens: int,
    ) -> tuple[Row, str]:
        """One streamed answer as a row, and its text."""
        body = {
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": load.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if conversation.tools:
            body |= {"tools": list(conversation.tools), "tool_choice": "none"}
        if self._template_kwargs:
            body["chat_template_kwargs"] = self._template_kwargs
        prompt_ids, token_ids, times_s = list[int](), list[int](), list[float]()
        text, finish, metrics = "", None, None
        sent_s = time.perf_counter()
        async for chunk in self._stream(session, "/v1/chat/completions", body):
            prompt_ids = chunk.get("prompt_token_ids") or prompt_ids
            metrics = chunk.get("metrics") or metrics
            for choice in chunk.get("choices", ()):
                if new := choice.get("token_ids"):
                    token_ids += new
                    times_s.append(time.perf_counter())
                text += choice.get("delta", {}).get("content") or ""
                finish = choice.get("finish_reason") or finish
        if finish is None:
            raise self._cut("")
        if not prompt_ids or not times_s:
            raise UserError(
                f"the server at {self.address.base_url} streams no token ids.",
                code="server-without-token-ids",
                remedy="Serve with vLLM 0.10.2 or newer, which understands return_token_ids.",
                facts={"url": self.address.base_url},
            )
        row = {
            "prompt_token_ids": prompt_ids,
            "token_ids": token_ids,
            "finish_reason": finish,
            "ttft_s": times_s[0] - sent_s,
            "latency_s": times_s[-1] - sent_s,
            "counters": _request_counters(metrics),
        }
        return row, text

    async def _post(
        self, session: aiohttp.ClientSession, path: str, body: Row
    ) -> aiohttp.ClientResponse:
        body = {"model": self.model, "return_token_ids": True, **_PLAIN_SAMPLING, **body}
        response = await session.post(f"{self.address.base_url}{path}", json=body)
        if response.status != 200:
            raise self.address.refusal(response.status, await response.text(), path)
        return response

    async def _stream(
        self, session: aiohttp.ClientSession, path: str, body: Row
    ) -> AsyncIterator[Row]:
        """The chunks of one streamed answer (server-sent events)."""
        async with await self._post(session, path, body) as response:
            async for line in response.content:
                kind, _, data = line.partition(b":")
                if kind != b"data" or data.strip() == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if error := chunk.get("error"):  # the status was sent long before
                    raise self._cut(str(error.get("message", error)))
                yield chunk

    def score(self, probes: list[Probe], concurrency: int) -> list[Scored]:
        """The greedy tokens after each probe, with their best logprobs."""
        return asyncio.run(self._score(probes, concurrency))

    async def _score(self, probes: list[Probe], concurrency: int) -> list[Scored]:
        slots = asyncio.Semaphore(concurrency)

        async def ask(session: aiohttp.ClientSession, probe: Probe) -> Scored:
            body = {
                "prompt": probe.prompt_token_ids,
                "max_tokens": probe.num_tokens,
                "temperature": 0.0,
                "logprobs": TOP,
                "ignore_eos": True,
                "return_tokens_as_token_ids": True,
            }
            async with slots, await self._post(session, "/v1/completions", body) as response:
                (choice,) = (await response.json())["choices"]
            best = [
                {int(name.removeprefix("token_id:")): value for name, value in step.items()}
                for step in choice["logprobs"]["top_logprobs"]
            ]
            return Scored(choice["token_ids"], best)

        async with self._session() as session:
            return list(await asyncio.gather(*(ask(session, probe) for probe in probes)))


def _request_counters(metrics: Any) -> Row | None:
    """One request's draft counters, where the server reports them (vLLM 0.30 or newer)."""
    drafted = (metrics or {}).get("speculative_decoding")
    if not drafted:
        return None
    histogram = drafted["acceptance_histogram"]
    return asdict(Counters.from_histogram(histogram, draft_tokens=drafted["num_draft_tokens"]))
