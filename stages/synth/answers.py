# SPDX-License-Identifier: Apache-2.0
"""Where answers come from: a server that synth starts, running endpoints, or the rows themselves."""

import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, Iterable, Iterator
from pathlib import Path

from shared.conversations.reader import ConversationReader, Refused
from shared.conversations.switches import require_reasoning_end
from shared.errors import RetryableError, UserError
from shared.prompts.rows import Prompt
from shared.runtime.gpus import visible_gpus
from shared.runtime.process import stop_requested
from shared.target.special_tokens import SpecialTokens
from shared.target.tokenizer import load_chat_tokenizer, load_tokenizer
from shared.vllm.batch import FEWEST_REQUESTS, requests_in_flight
from stages.synth.client import Client, Dispatcher, Endpoint, Outcome, ServerDiedError
from stages.synth.config import SynthConfig

logger = logging.getLogger(__name__)

_REMEDY = "Finished rows are saved; run the same command again."


async def answers(
    config: SynthConfig, target: Path, prompts: Iterator[Prompt]
) -> AsyncGenerator[tuple[Outcome, int], None]:
    """Every prompt's outcome as it arrives, and how many are in flight.

    A server that dies is started again, at most `max_restarts` times; the prompts in flight are
    asked again. Ends early, without an error, when a stop was asked for.

    Raises:
        RetryableError: the server died once too often, or endpoints do not answer.
        UserError: the server cannot start, or an endpoint serves something else.
    """
    first = next(prompts, None)
    if first is None:  # all is answered already: no server for that
        return
    prompts = itertools.chain([first], prompts)
    if config.mode == "keep":
        for outcome in kept(config, target, prompts):
            yield outcome, 0
        return
    reasoning_end, special = _of_tokenizer(config, target)
    concurrency = in_flight(config)
    config = config.model_copy(update={"concurrency": concurrency})
    dispatcher = Dispatcher(concurrency)
    for start in range(config.max_restarts + 1):
        with _endpoints(config, target, start) as endpoints:
            client = Client(endpoints, config, reasoning_end, special)
            try:
                async with contextlib.aclosing(dispatcher.outcomes(client, prompts)) as outcomes:
                    async for outcome in outcomes:
                        yield outcome, len(dispatcher)
                return
            except ServerDiedError as error:
                if config.endpoints:
                    raise RetryableError(
                        f"the server no longer answers: {error}.",
                        code="endpoint-died",
                        remedy=_REMEDY,
                    ) from error
                if start == config.max_restarts:
                    raise RetryableError(
                        f"the vLLM server died ({error}) after {start} restarts, which is "
                        "synth.max_restarts.",
                        code="server-died",
                        remedy=_REMEDY,
                        facts={"restarts": start},
                    ) from error
                logger.warning("the server died (%s); starting it again", error)
            finally:
                await client.close()


def in_flight(config: SynthConfig) -> int:
    """Requests in flight: as set, else as many as the servers' memory suggests."""
    if config.concurrency != "auto":
        return config.concurrency
    if config.endpoints:
        return FEWEST_REQUESTS * len(config.endpoints)
    sizes = [size for _, size in visible_gpus() if size is not None]
    found = requests_in_flight(min(sizes, default=0))
    logger.info("concurrency auto: %d requests in flight", found)
    return found


def kept(config: SynthConfig, target: Path, prompts: Iterable[Prompt]) -> Iterator[Outcome]:
    """Mode `keep`: the rows' own answers, tokenised and masked by the target's chat template."""
    tokenizer = load_chat_tokenizer(target, config.run, config.workspace)
    reader = ConversationReader(
        tokenizer, config.run, config.special_token_text, config.reasoning_end
    )
    for prompt in prompts:
        if stop_requested():
            return
        try:
            yield Outcome(prompt, tuple(reader.rows(prompt)))
        except Refused as refused:
            yield Outcome(prompt, refused=refused)


@contextlib.contextmanager
def _endpoints(config: SynthConfig, target: Path, start: int) -> Iterator[list[Endpoint]]:
    from stages.synth.endpoints import connect
    from stages.synth.engine import serve

    if config.endpoints:
        yield connect(config, target)
        return
    with contextlib.ExitStack() as held:
        try:
            endpoint = held.enter_context(serve(config, target))
        except UserError as error:
            if start == 0:
                raise
            raise RetryableError(
                f"the server died and does not start again: {error.problem}",
                code="server-does-not-restart",
                remedy=_REMEDY,
                facts={"first_code": error.code},
            ) from error
        yield [endpoint]


def _of_tokenizer(
    config: SynthConfig, target: Path
) -> tuple[tuple[int, ...], SpecialTokens | None]:
    """The ids that end a reasoning that is not trained on; the control tokens to look out for.

    Raises:
        UserError: the target ends its reasoning otherwise.
    """
    drops, skips = config.run.reasoning == "drop", config.special_token_text == "skip"
    if not drops and not skips:
        return (), None
    tokenizer = load_tokenizer(target, trust_remote_code=config.run.trust_remote_code)
    if drops:
        require_reasoning_end(tokenizer, config.reasoning_end, target)
    end = tokenizer(config.reasoning_end, add_special_tokens=False)["input_ids"] if drops else ()
    return tuple(end), SpecialTokens(tokenizer) if skips else None
