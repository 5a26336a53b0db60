# SPDX-License-Identifier: Apache-2.0
"""Running servers: each is checked to serve the target before it gets a prompt."""

import functools
import logging
import os
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.target.tokenizer import load_tokenizer
from shared.vllm.http import Address
from shared.vllm.server import is_healthy
from stages.synth.client import Endpoint
from stages.synth.config import SynthConfig

KEY_VARIABLE = "EYRIE_ENDPOINT_KEY"
PROBE = [{"role": "user", "content": "Do these two share one tokenizer? 12 345, naïve, \\n\\n"}]

logger = logging.getLogger(__name__)


def connect(config: SynthConfig, target: Path) -> list[Endpoint]:
    """The recipe's endpoints, each seen to answer and to tokenise as the target does.

    Raises:
        RetryableError: one does not answer.
        UserError: one serves another model, shorter contexts, or refuses the key.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    expected = _local_ids(config, target)
    found = []
    for url in config.endpoints:
        address = Address(url, key, KEY_VARIABLE)
        base_url = address.base_url
        served = address.json("/v1/models")["data"][0]
        _require_same(config, address, served, expected)
        logger.info("%s serves %s", base_url, served["id"])
        found.append(
            Endpoint(
                base_url=base_url,
                model=served["id"],
                api_key=key,
                exit_code=lambda: None,
                is_healthy=functools.partial(is_healthy, base_url),
            )
        )
    return found


def _local_ids(config: SynthConfig, target: Path) -> list[int]:
    tokenizer = load_tokenizer(target, trust_remote_code=config.run.trust_remote_code)
    encoded = tokenizer.apply_chat_template(PROBE, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _require_same(config: SynthConfig, address: Address, served: Any, expected: list[int]) -> None:
    base_url = address.base_url
    body = {"model": served["id"], "messages": PROBE, "add_generation_prompt": True}
    found = address.json("/tokenize", body)["tokens"]
    if found != expected:
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
