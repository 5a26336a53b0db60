# SPDX-License-Identifier: Apache-2.0
"""What a hub's client raises, whatever it asks for; and which of that may pass."""

import errno
import sys

from huggingface_hub import errors

from shared.errors import FOREIGN_ERRORS

# Its own, and those of the HTTP library below it, which it re-exports and which derive from nothing narrower
# than Exception. The rest is what an answer of another shape than it expects ends in.
HUB_ERRORS: tuple[type[Exception], ...] = (
    *FOREIGN_ERRORS,
    *(
        each
        for module in (errors, sys.modules[errors.HTTPError.__module__])
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Exception)
    ),
)


def status_of(error: Exception) -> int | None:
    """The hub's status code, where it did answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: the network, or a hub that is busy."""
    if (status := status_of(error)) is not None:
        return status == 429 or status >= 500
    is_network = isinstance(error, errors.HTTPError | ConnectionError | TimeoutError)
    return is_network or getattr(error, "errno", None) == errno.EIO
