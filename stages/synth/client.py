# SPDX-License-Identifier: Apache-2.0
"""The client's side: many requests in flight, exact token ids back.

vLLM answers `return_token_ids` with the prompt's ids and each choice's ids, so nothing is ever
tokenised here.
"""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Any

import openai
import tenacity

from shared.conversations import Conversation
from shared.errors import OutputError, RetryableError
from shared.process import stop_requested
from shared.prompts import Prompt
from stages.synth.config import SynthConfig
from stages.synth.engine import MODEL_NAME, Server

logger = logging.getLogger(__name__)

_MAY_YET_SUCCEED = (
    openai.APIConnectionError,
    openai.APITimeoutError,
    openai.RateLimitError,
    openai.InternalServerError,
)


@dataclasses.dataclass(frozen=True)
class Refused:
    """A prompt that the server would not answer, and why."""

    prompt: Prompt
    reason: str
    detail: str


def _to_conversation(prompt: Prompt, response: Any, source: str) -> Conversation:
    choice = response.choices[0]
    prompt_ids = (response.model_extra or {}).get("prompt_token_ids")
    answer_ids = (choice.model_extra or {}).get("token_ids")
    if not prompt_ids or answer_ids is None:
        raise OutputError(
            "the server's answer carries no token ids: it must understand return_token_ids "
            "(vLLM 0.10.2 or newer)."
        )
    start, end = len(prompt_ids), len(prompt_ids) + len(answer_ids)
    answer = {"role": "assistant", "content": choice.message.content or ""}
    return Conversation(
        sample_id=prompt.sample_id,
        conversation_id=prompt.sample_id,
        source=source,
        category=prompt.category,
        messages=(*prompt.messages, answer),
        input_ids=(*prompt_ids, *answer_ids),
        loss_spans=((start, end),) if answer_ids else (),
        finish_reason=choice.finish_reason or "",
        num_prompt_tokens=len(prompt_ids),
        num_completion_tokens=len(answer_ids),
    )


async def _answer(
    client: openai.AsyncOpenAI, config: SynthConfig, prompt: Prompt, source: str
) -> Conversation | Refused:
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(_MAY_YET_SUCCEED),
        stop=tenacity.stop_after_attempt(config.max_retries + 1),
        wait=tenacity.wait_exponential_jitter(initial=0.5, max=20),
        reraise=True,
    )
    messages: Any = list(prompt.messages)
    try:
        async for attempt in retrying:
            with attempt:
                response = await client.chat.completions.create(
                    model=MODEL_NAME,
                    messages=messages,
                    max_tokens=config.max_tokens,
                    temperature=config.temperature,
                    top_p=config.top_p,
                    seed=config.run.seed,
                    extra_body={"return_token_ids": True},
                )
    except openai.BadRequestError as error:
        too_long = "context length" in str(error) or "max_model_len" in str(error)
        return Refused(prompt, "too_long" if too_long else "refused_by_server", str(error)[:500])
    conversation = _to_conversation(prompt, response, source)
    if not conversation.loss_spans:
        return Refused(prompt, "empty_answer", conversation.finish_reason)
    return conversation


async def answer_all(
    server: Server, config: SynthConfig, prompts: Iterable[Prompt], source: str
) -> AsyncIterator[Conversation | Refused]:
    """Every prompt's answer as it arrives, with at most `config.concurrency` in flight.

    Ends early, without an error, when a stop was asked for.

    Raises:
        RetryableError: the server does not answer any more.
    """
    client = openai.AsyncOpenAI(
        base_url=f"{server.base_url}/v1",
        api_key=server.api_key,
        timeout=config.request_timeout_s,
        max_retries=0,
    )
    waiting = iter(prompts)
    in_flight: set[asyncio.Task[Conversation | Refused]] = set()
    try:
        while not stop_requested():
            while len(in_flight) < config.concurrency and (prompt := next(waiting, None)):
                in_flight.add(asyncio.ensure_future(_answer(client, config, prompt, source)))
            if not in_flight:
                return
            done, in_flight = await asyncio.wait(
                in_flight, timeout=1.0, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                yield task.result()
    except openai.OpenAIError as error:
        code = server.exit_code()
        state = "still runs" if code is None else f"ended with code {code}"
        raise RetryableError(
            f"the vLLM server {state} and does not answer: {error}. Finished rows are saved; run "
            "the same command again."
        ) from error
    finally:
        for task in in_flight:
            task.cancel()
        await client.close()
