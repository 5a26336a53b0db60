# SPDX-License-Identifier: Apache-2.0
"""Running servers: each is checked to serve the target before it gets a prompt."""

import datetime
import functools
import logging
import os
from pathlib import Path
from typing import Any

from shared.conversations.template import ChatTemplate, common_length
from shared.errors import UserError
from shared.target.tokenizer import load_chat_tokenizer
from shared.vllm.http import Address
from shared.vllm.server import is_healthy
from stages.synth.client import Endpoint
from stages.synth.config import SynthConfig

KEY_VARIABLE = "EYRIE_ENDPOINT_KEY"
PROBE = [{"role": "user", "content": "Do these two share one tokenizer? 12 345, naïve, \\n\\n"}]
# Dates that differ in every part that a template may print.
_DATES = (datetime.datetime(2001, 1, 11), datetime.datetime(2038, 12, 25))

logger = logging.getLogger(__name__)


def connect(config: SynthConfig, target: Path) -> list[Endpoint]:
    """The recipe's endpoints, each seen to answer and to tokenise as the target does.

    Raises:
        RetryableError: one does not answer.
        UserError: one serves another model, shorter contexts, or refuses the key.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    local = _local_ids(config, target)
    found = []
    for url in config.endpoints:
        address = Address(url, key, KEY_VARIABLE)
        base_url = address.base_url
        served = address.json("/v1/models")["data"][0]
        _require_same(config, address, served, local)
        logger.info("%s serves %s", base_url, served["id"])
        found.append(
            Endpoint(
                address=address,
                model=served["id"],
                exit_code=lambda: None,
                is_healthy=functools.partial(is_healthy, base_url),
            )
        )
    return found


def _local_ids(config: SynthConfig, target: Path) -> list[list[int]]:
    """The probe's tokens on two dates: where the template prints none, they are equal."""
    tokenizer = load_chat_tokenizer(target, config.run, config.workspace)
    return [
        ChatTemplate(
            tokenizer, {"strftime_now": date.strftime, **config.run.template_kwargs}
        ).prompt_ids(PROBE)
        for date in _DATES
    ]


def _is_same(found: list[int], local: list[list[int]]) -> bool:
    """Whether the served tokens are the local ones, whatever date the server prints."""
    one, other = local
    if one == other:
        return found == one
    before = common_length(one, other)
    after = common_length(one[::-1], other[::-1])
    return found[:before] == one[:before] and found[len(found) - after :] == one[len(one) - after :]


def _require_same(
    config: SynthConfig, address: Address, served: Any, local: list[list[int]]
) -> None:
    base_url, expected = address.base_url, local[0]
    body = {
        "model": served["id"],
        "messages": PROBE,
        "add_generation_prompt": True,
        "chat_template_kwargs": config.run.template_kwargs,
    }
    found = address.json("/tokenize", body)["tokens"]
    if not _is_same(found, local):
        raise UserError(
            f"{base_url} serves {served['id']}, which turns a probe message into {len(found)} "
            f"tokens {found[:12]}, while {config.run.target} gives {len(expected)}: "
            f"{expected[:12]}. Its tokenizer or chat template is another one.",
            code="endpoint-other-target",
            remedy="Set run.target to what the endpoint serves.",
            facts={"endpoint": base_url, "serves": served["id"]},
        )
    longest = served.get("max_model_len") or config.run.max_length_tokens
    if longest < config.run.max_length_tokens:
        raise UserError(
            f"{base_url} serves at most {longest} tokens per row; run.max_length_tokens is "
            f"{config.run.max_length_tokens}.",
            code="endpoint-too-short",
            remedy="Start it with a longer --max-model-len, or lower run.max_length_tokens.",
            facts={"endpoint": base_url, "max_model_len": longest},
        )
