# SPDX-License-Identifier: Apache-2.0
"""A vLLM server's address, and single requests to it. Many requests at once are the stages' clients'."""

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from shared.errors import EyrieError, RetryableError, UserError

_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the key that it wants.

    Attributes:
        url: as given; a slash or `/v1` at its end makes no difference.
        key_variable: the environment variable that holds the key, for messages.
    """

    url: str
    api_key: str = field(default="", repr=False)
    key_variable: str = ""

    @property
    def base_url(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def hide_key(self, text: str) -> str:
        """`text`, which a server wrote and others will read, without the key."""
        return text.replace(self.api_key, "(the key)") if self.api_key else text

    def request(self, path: str, body: Any = None) -> str:
        """The answer to a GET, or to a POST of `body` as JSON.

        Raises:
            RetryableError: no answer, or the server's own failure.
            UserError: the server refuses.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **self.headers}
        request = urllib.request.Request(f"{self.base_url}{path}", data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            raise self.refusal(error.code, str(error.reason), path) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self.unreachable(error) from error

    def json(self, path: str, body: Any = None) -> Any:
        """The same, as JSON values."""
        try:
            return json.loads(self.request(path, body))
        except ValueError as error:
            raise self.unreachable(error) from error

    def refusal(self, status: int, reason: str, path: str) -> EyrieError:
        """The error for an HTTP status that is no success."""
        problem = f"{self.base_url}{path} answered {status} {self.hide_key(reason)[:500]}".rstrip(
            "."
        )
        facts = {"url": self.base_url, "status": status}
        if status == 429 or status >= 500:
            return RetryableError(
                f"{problem}.",
                code="server-failing",
                remedy="Look at the server's log; run the same command again.",
                facts=facts,
            )
        if status in (401, 403):
            remedy = f"Put its key into ${self.key_variable}." if self.key_variable else ""
            return UserError(f"{problem}.", code="server-key-refused", remedy=remedy, facts=facts)
        return UserError(
            f"{problem}.",
            code="server-refused",
            remedy="It must be a vLLM server of a supported version, at this very address.",
            facts=facts,
        )

    def unreachable(self, error: BaseException) -> RetryableError:
        """The error for a server that does not answer."""
        words = str(error) or type(error).__name__
        return RetryableError(
            f"the server at {self.base_url} does not answer ({self.hide_key(words)[:300]}).",
            code="server-unreachable",
            remedy="Is it up, and is its address right? Run the same command again once it is.",
            facts={"url": self.base_url},
        )
