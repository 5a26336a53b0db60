# SPDX-License-Identifier: Apache-2.0
"""Many requests in flight against one or more servers; failures that may pass are retried.

vLLM answers `return_token_ids` with the prompt's ids and each choice's ids, so nothing is ever
tokenised here. Plain aiohttp: the openai client costs several milliseconds of processor time a
request, most of it in checking what it sends and copying what it gets, beside a server that needs
the processor itself.
"""

import asyncio
import dataclasses
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from typing import Any

import aiohttp
import tenacity

from shared.contracts.conversations import Conversation
from shared.conversations.reader import TOO_LONG, Refused
from shared.errors import OutputError
from shared.prompts.rows import Message, Prompt
from shared.runtime.process import stop_requested
from shared.target.special_tokens import REASON, SpecialTokens
from shared.vllm.http import Address
from stages.synth.config import SynthConfig
from stages.synth.mixture import request_seed, sampling_of
from stages.synth.play import Played, Reply, play, to_rows

logger = logging.getLogger(__name__)

# How the supported versions of vLLM refuse a prompt that is too long.
_TOO_LONG = ("context length", "maximum model length")

# A running server's generation_config.json must not decide how the answers are sampled.
_PLAIN_SAMPLING = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class BusyError(Exception):
    """429 or 5xx: a retry of the same request may succeed."""


_RETRIED = (BusyError, aiohttp.ClientError, TimeoutError)


class ServerDiedError(Exception):
    """No server answers any more; the rows in flight must be sent again."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A server: its address and key, its model's name, and how to ask for its state."""

    address: Address
    model: str
    exit_code: Callable[[], int | None]  # of a process that we started; checked before each request
    is_healthy: Callable[[], bool]  # it answers /health; checked after a failure


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result for one prompt: rows, or a refusal."""

    prompt: Prompt
    rows: tuple[Conversation, ...] = ()
    refused: Refused | None = None


def _message(raw: dict[str, Any]) -> Message:
    message: Message = {"role": "assistant", "content": raw.get("content") or ""}
    reasoning = raw.get("reasoning") or raw.get("reasoning_content")
    if reasoning:
        message["reasoning_content"] = reasoning
    if raw.get("tool_calls"):
        message["tool_calls"] = [
            {key: call[key] for key in ("id", "type", "function")} for call in raw["tool_calls"]
        ]
    return message


def _reply(response: dict[str, Any]) -> Reply:
    choice = response["choices"][0]
    prompt_ids, answer_ids = response.get("prompt_token_ids"), choice.get("token_ids")
    if not prompt_ids or answer_ids is None:
        raise OutputError(
            "the server's answer carries no token ids.",
            code="answer-without-token-ids",
            remedy="Use vLLM 0.10.2 or newer, which understands return_token_ids.",
        )
    return Reply(
        message=_message(choice["message"]),
        prompt_ids=tuple(prompt_ids),
        answer_ids=tuple(answer_ids),
        finish_reason=choice.get("finish_reason") or "",
    )


class Client:
    """Sends requests to the endpoints in turn.

    Args:
        special: control tokens that no message may contain as text; None if the recipe allows it.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        config: SynthConfig,
        reasoning_end: tuple[int, ...],
        special: SpecialTokens | None = None,
    ) -> None:
        self.config = config
        self._endpoints = endpoints
        self._sent = 0
        self._reasoning_end = reasoning_end
        self._special = special
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=config.request_timeout_s),
        )

    async def close(self) -> None:
        await self._session.close()

    def _options(self, prompt: Prompt, turn: int) -> dict[str, Any]:
        config = self.config
        temperature, top_p = sampling_of(config, prompt.sample_id)
        options: dict[str, Any] = {
            # vLLM refuses more than the model's whole length, and clips what is left of it.
            "max_tokens": min(config.max_tokens, config.run.max_length_tokens),
            "temperature": temperature,
            "top_p": top_p,
            "seed": request_seed(config, prompt.sample_id, turn),
            "return_token_ids": True,
            **_PLAIN_SAMPLING,
        }
        if config.run.template_kwargs:
            options["chat_template_kwargs"] = config.run.template_kwargs
        if prompt.tools:
            options["tools"] = list(prompt.tools)
            # Without a parser the calls stay in the answer's text; the template shows the tools.
            options["tool_choice"] = "auto" if config.tool_call_parser else "none"
        return options

    async def _request(self, prompt: Prompt, messages: Sequence[Message], turn: int) -> Reply:
        """One answer.

        Raises:
            Refused: the server will not, or could not in time although it lives.
            ServerDiedError: it is gone.
        """
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_RETRIED),
            stop=tenacity.stop_after_attempt(self.config.max_retries + 1),
            wait=tenacity.wait_exponential_jitter(multiplier=0.2, max=20),
            reraise=True,
        )
        body = {"messages": list(messages), **self._options(prompt, turn)}
        try:
            async for attempt in retrying:
                with attempt:
                    endpoint = self._endpoints[self._sent % len(self._endpoints)]
                    self._sent += 1
                    if (code := endpoint.exit_code()) is not None:
                        raise ServerDiedError(f"code {code}")
                    return await self._post(endpoint, {"model": endpoint.model, **body})
        except _RETRIED as error:
            healthy = [await asyncio.to_thread(each.is_healthy) for each in self._endpoints]
            if not any(healthy):
                ended = [code for each in self._endpoints if (code := each.exit_code()) is not None]
                reason = f"code {ended[0]}" if ended else str(error) or type(error).__name__
                raise ServerDiedError(reason) from error
            reason = "timeout" if isinstance(error, TimeoutError) else "server_error"
            raise Refused(reason, str(error)) from error
        raise RuntimeError("tenacity returns an answer or raises")

    async def _post(self, endpoint: Endpoint, body: dict[str, Any]) -> Reply:
        async with self._session.post(
            f"{endpoint.address.base_url}/v1/chat/completions",
            json=body,
            headers=endpoint.address.headers,
        ) as response:
            content = await response.read()
            if response.status == 200:
                return _reply(json.loads(content))
            # The server's message is logged, and it may repeat the key.
            text = endpoint.address.hide_key(content.decode(errors="replace"))[:500]
        if response.status == 429 or response.status >= 500:
            raise BusyError(f"{response.status}: {text}")
        too_long = any(words in text for words in _TOO_LONG)
        raise Refused(TOO_LONG if too_long else "refused_by_server", f"{response.status}: {text}")

    async def answer(self, prompt: Prompt) -> Outcome:
        """Play one prompt to its end.

        Raises:
            ServerDiedError: no server answers any more.
        """

        async def ask(messages: Sequence[Message], turn: int) -> Reply:
            # Checks earlier answers of the target as well: it may have spelled one in plain tokens.
            if self._special and (token := self._special.first_in([messages, prompt.tools])):
                raise Refused(REASON, token)
            return await self._request(prompt, messages, turn)

        try:
            played: Played = await play(prompt, ask, self.config)
        except Refused as refused:
            return Outcome(prompt, refused=refused)
        rows = tuple(to_rows(prompt, played, reasoning_end=self._reasoning_end))
        if not rows:
            reply = played.turns[-1].reply
            reason = "only_reasoning" if reply.answer_ids else "empty_answer"
            return Outcome(prompt, refused=Refused(reason, reply.finish_reason))
        return Outcome(prompt, rows)


class Dispatcher:
    """Keeps at most `concurrency` prompts in flight, and knows which they are."""

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self._in_flight: dict[asyncio.Task[Outcome], Prompt] = {}
        self._again: list[Prompt] = []

    def __len__(self) -> int:
        return len(self._in_flight)

    async def outcomes(
        self, client: Client, prompts: Iterable[Prompt]
    ) -> AsyncGenerator[Outcome, None]:
        """Every prompt's outcome as it arrives; what an earlier, dead server left comes first.

        Ends early, without an error, when a stop was asked for.

        Raises:
            ServerDiedError: call again with a client of a new server and the same iterator.
        """
        waiting = iter(prompts)
        try:
            while not stop_requested():
                while len(self) < self.concurrency and (prompt := self._next(waiting)):
                    task = asyncio.ensure_future(client.answer(prompt))
                    self._in_flight[task] = prompt
                if not self._in_flight:
                    return
                done, _ = await asyncio.wait(
                    self._in_flight, timeout=1.0, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    outcome = task.result()  # raises before the task is forgotten
                    del self._in_flight[task]
                    yield outcome
        finally:
            self._again += self._in_flight.values()
            for task in self._in_flight:
                task.cancel()
            await asyncio.gather(*self._in_flight, return_exceptions=True)
            self._in_flight = {}

    def _next(self, waiting: Iterator[Prompt]) -> Prompt | None:
        return self._again.pop(0) if self._again else next(waiting, None)
