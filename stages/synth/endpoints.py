# SPDX-License-Identifier: Apache-2.0
"""Running servers: each is checked to serve the target before it gets a prompt."""

import functools
import http.client
import json
import logging
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from shared.errors import RetryableError, UserError
from shared.target.tokenizer import load_tokenizer
from shared.vllm.server import base_of, is_healthy
from stages.synth.client import Endpoint
from stages.synth.config import SynthConfig

KEY_VARIABLE = "EYRIE_ENDPOINT_KEY"
PROBE = [{"role": "user", "content": "Do these two share one tokenizer? 12 345, naïve, \\n\\n"}]
_TIMEOUT_S = 30.0

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
        base_url = base_of(url)
        served = _request(base_url, "/v1/models", key)["data"][0]
        _require_same(config, base_url, served, expected, key)
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


def _require_same(
    config: SynthConfig, base_url: str, served: Any, expected: list[int], key: str
) -> None:
    body = {"model": served["id"], "messages": PROBE, "add_generation_prompt": True}
    found = _request(base_url, "/tokenize", key, body)["tokens"]
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


def _request(base_url: str, path: str, key: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        f"{base_url}{path}",
        data=json.dumps(body).encode() if body is not None else None,
        headers={
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {key}"} if key else {}),
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise RetryableError(f"{base_url}{path} answers {error.code}.") from error
        raise UserError(
            f"{base_url}{path} answers {error.code} {error.reason}. It must be a vLLM server"
            + (f", and its key goes into ${KEY_VARIABLE}." if error.code in (401, 403) else ".")
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RetryableError(
            f"{base_url} does not answer: {error}. Is it up, and is synth.endpoints right?"
        ) from error
