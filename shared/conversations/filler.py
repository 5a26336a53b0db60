# SPDX-License-Identifier: Apache-2.0
"""Templates that write words of their own where an answer says nothing."""

from collections.abc import Callable, Sequence

from shared.conversations.template import TemplateMismatch, common_length
from shared.prompts.rows import Message

_PROBE = "Zq0y0qZ"


def require_no_filler(
    render: Callable[[Sequence[Message]], str], before: Sequence[Message], message: Message
) -> None:
    """Refuse a template that shows an empty content as something else.

    Raises:
        TemplateMismatch: it does.
    """
    try:
        filled = _dense(render([*before, {**message, "content": _PROBE}]))
    except TemplateMismatch:
        # gpt-oss takes a call with reasoning or with content, not with both.
        if "reasoning_content" not in message:
            raise
        message = {key: value for key, value in message.items() if key != "reasoning_content"}
        filled = _dense(render([*before, {**message, "content": _PROBE}]))
    shown = _dense(render([*before, message]))
    if filled == shown:  # content beside a call is not shown at all
        return
    # What surrounds the content may go with it, as a channel of its own does.
    first = common_length(filled, shown)
    last = common_length(filled[first:][::-1], shown[first:][::-1])
    left_out = filled[first : len(filled) - last]
    if first + last < len(shown) or _PROBE not in left_out:
        raise TemplateMismatch(
            f"message {len(before)}: its empty content is shown as something else"
        )


def _dense(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())
