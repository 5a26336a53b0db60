# SPDX-License-Identifier: Apache-2.0
"""The client's side of a served measurement: a closed loop of streamed chats, and `/metrics`.

In: a server's address and key, conversations, a cell. Out: rows as the in-process engine's. Costs
one core at most. The surprise: times are this client's clock, from sending to the first and the
last chunk that carries token ids, so they include the queue and the network, as a user sees them.
No request is retried: a second attempt would be counted by the server and not by us.
"""

import asyncio
import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import openai

from shared.errors import RetryableError, UserError
from shared.runtime.process import stop_if_requested
from shared.vllm.server import base_of
from stages.bench.figures.metrics import Counters
from stages.bench.lossless.divergence import TOP, Probe, Scored
from stages.bench.measure import plans
from stages.bench.measure.cells import Cell, Conversation
from stages.bench.measure.exposition import Reading, parse

_SETTLE_S = 10.0
_POLL_S = 0.1
# The server's generation_config.json must not decide how we sample.
_PLAIN_SAMPLING = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class Server:
    """Somebody's vLLM server: where it is, what it serves, and how to ask it."""

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        request_timeout_s: float,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.base_url = base_of(base_url)
        self._key = api_key
        self._timeout_s = request_timeout_s
        self._template_kwargs = chat_template_kwargs or {}
        self.model, self.max_model_len = "", 0

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[openai.AsyncOpenAI]:
        """A client of the running event loop; its faults as ours."""
        client = openai.AsyncOpenAI(
            base_url=f"{self.base_url}/v1",
            api_key=self._key or "none",
            max_retries=0,
            timeout=self._timeout_s,
        )
        try:
            async with client:
                yield client
        except (
            openai.APIConnectionError,
            openai.InternalServerError,
            openai.RateLimitError,
        ) as error:
            raise RetryableError(
                f"the server at {self.base_url} does not answer ({error}; {error.__cause__}). Is it "
                "up and reachable from here? Run the same command again once it is."
            ) from error
        except openai.APIStatusError as error:
            raise UserError(f"the server at {self.base_url} refused: {error}.") from error
        except (openai.APIError, json.JSONDecodeError) as error:  # in the middle of an answer
            raise RetryableError(
                f"the server at {self.base_url} ended an answer in its middle ({error}). Its log says "
                "why; run the same command again."
            ) from error

    def connect(self) -> str:
        """Ask for the model that it serves; returns vLLM's version.

        Raises:
            RetryableError: it does not answer.
            UserError: it refuses the key, or is no vLLM.
        """

        async def first_model() -> Any:
            async with self._client() as client:
                return (await client.models.list()).data[0]

        found = asyncio.run(first_model())
        self.model = found.id
        self.max_model_len = int((found.model_extra or {}).get("max_model_len") or 0)
        self.read()
        with contextlib.suppress(RetryableError, UserError, ValueError, KeyError):
            return str(json.loads(self._get("/version"))["version"])
        return "unknown"

    def _get(self, path: str) -> str:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        request = urllib.request.Request(f"{self.base_url}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            raise UserError(
                f"{self.base_url}{path} answered {error.code} {error.reason}."
            ) from error
        except OSError as error:
            raise RetryableError(f"{self.base_url}{path} does not answer ({error}).") from error

    def read(self) -> Reading:
        """What `/metrics` says now.

        Raises:
            UserError: it is not vLLM's.
        """
        text = self._get("/metrics")
        try:
            return parse(text)
        except ValueError as error:
            raise UserError(
                f"{self.base_url}/metrics: expected vLLM's counters, found another text ({error}). "
                "bench measures vLLM servers."
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
            if not reading.unfinished and settled:
                break
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        strangers = 0 if answered is None else reading.answered - answered
        if reading.unfinished or strangers:
            raise RetryableError(
                f"the server at {self.base_url} must be ours alone while it is measured: "
                f"{reading.unfinished} requests still run, {strangers} answers were not asked by us. "
                "Measure it when it is idle."
            )
        return reading

    def play(
        self, conversations: Sequence[Conversation], cell: Cell, *, max_tokens: int, depth: int
    ) -> list[dict[str, Any]]:
        """Every conversation, `cell.concurrency` at a time; rows in the conversations' order."""
        return asyncio.run(self._play(conversations, cell, max_tokens, depth))

    async def _play(
        self, conversations: Sequence[Conversation], cell: Cell, max_tokens: int, depth: int
    ) -> list[dict[str, Any]]:
        rows: list[list[dict[str, Any]]] = [[] for _ in conversations]
        waiting: Iterator[int] = iter(range(len(conversations)))

        async def worker(client: openai.AsyncOpenAI) -> None:
            for index in waiting:
                await self._converse(
                    client, conversations[index], cell, max_tokens, depth, rows[index]
                )

        async with self._client() as client:
            workers = [asyncio.create_task(worker(client)) for _ in range(cell.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in workers:
                    task.cancel()
        return [row for talk in rows for row in talk]

    async def _converse(
        self,
        client: openai.AsyncOpenAI,
        conversation: Conversation,
        cell: Cell,
        max_tokens: int,
        depth: int,
        rows: list[dict[str, Any]],
    ) -> None:
        messages: list[Any] = []
        for turn, step in enumerate(conversation.steps):
            stop_if_requested("a measurement is only kept whole")
            messages += step
            row, text = await self._chat(client, conversation, messages, cell, max_tokens)
            if self.max_model_len:
                longest = len(row["prompt_token_ids"])
                plans.check_room(conversation.id, longest, max_tokens, depth, self.max_model_len)
            rows.append(
                {"id": conversation.id, "turn": turn, "category": conversation.category, **row}
            )
            messages.append({"role": "assistant", "content": text})

    async def _chat(
        self,
        client: openai.AsyncOpenAI,
        conversation: Conversation,
        messages: list[Any],
        cell: Cell,
        max_tokens: int,
    ) -> tuple[dict[str, Any], str]:
        """One streamed answer as a row, and its text."""
        extra: dict[str, Any] = {"return_token_ids": True, **_PLAIN_SAMPLING}
        if self._template_kwargs:
            extra["chat_template_kwargs"] = self._template_kwargs
        if conversation.tools:
            extra |= {"tools": list(conversation.tools), "tool_choice": "none"}
        sent_s = time.perf_counter()
        stream: Any = await client.chat.completions.create(
            model=self.model,
            messages=list(messages),
            max_tokens=max_tokens,
            temperature=cell.temperature,
            top_p=1.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        prompt_ids: list[int] = []
        token_ids: list[int] = []
        times_s: list[float] = []
        text, finish, metrics = "", None, None
        async for chunk in stream:
            more = chunk.model_extra or {}
            prompt_ids = more.get("prompt_token_ids") or prompt_ids
            metrics = more.get("metrics") or metrics
            for choice in chunk.choices:
                if new := (choice.model_extra or {}).get("token_ids"):
                    token_ids += new
                    times_s.append(time.perf_counter())
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
        if finish is None:
            raise RetryableError(
                f"the server at {self.base_url} ended an answer in its middle. Is it up and "
                "reachable from here? Run the same command again once it is."
            )
        if not prompt_ids or not times_s:
            raise UserError(
                f"the server at {self.base_url} streams no token ids: expected vLLM 0.10.2 or newer, "
                "which understands return_token_ids."
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

    def score(self, probes: list[Probe], concurrency: int) -> list[Scored]:
        """The greedy tokens after each probe, with their best logprobs."""
        return asyncio.run(self._score(probes, concurrency))

    async def _score(self, probes: list[Probe], concurrency: int) -> list[Scored]:
        slots = asyncio.Semaphore(concurrency)

        async def ask(client: openai.AsyncOpenAI, probe: Probe) -> Scored:
            async with slots:
                answer: Any = await client.completions.create(
                    model=self.model,
                    prompt=probe.prompt_token_ids,
                    max_tokens=probe.num_tokens,
                    temperature=0.0,
                    logprobs=TOP,
                    extra_body={
                        "ignore_eos": True,
                        "return_token_ids": True,
                        "return_tokens_as_token_ids": True,
                        **_PLAIN_SAMPLING,
                    },
                )
            choice = answer.choices[0]
            best = [
                {int(name.removeprefix("token_id:")): value for name, value in step.items()}
                for step in choice.logprobs.top_logprobs
            ]
            return Scored(list((choice.model_extra or {})["token_ids"]), best)

        async with self._client() as client:
            return list(await asyncio.gather(*(ask(client, probe) for probe in probes)))


def _request_counters(metrics: Any) -> dict[str, Any] | None:
    """One request's draft counters, where the server reports them (vLLM 0.30 or newer)."""
    drafted = (metrics or {}).get("speculative_decoding")
    if not drafted:
        return None
    histogram = drafted["acceptance_histogram"]
    return asdict(Counters.from_histogram(histogram, draft_tokens=drafted["num_draft_tokens"]))
