# SPDX-License-Identifier: Apache-2.0
"""Control tokens that somebody spelled out in plain text.

A tokenizer turns the text `<|im_end|>` into the control token of that name, wherever it stands, and so
do the engines' chat endpoints. A prompt that contains it could end its own turn and speak as the
assistant. So such a row is left out, with this reason, unless the recipe allows it.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

REASON = "special_token_in_text"
Policy = Literal["skip", "allow"]
POLICY_DOC = (
    "What to do with a row whose text spells one of the target's control tokens: skip it, or allow "
    "the text to become that token."
)


class SpecialTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        known = {str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special}
        # The longest first: if one is the beginning of another, the longer one is reported.
        by_length = sorted(known - {""}, key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, by_length)) or "(?!)")

    def first_in(self, value: Any) -> str | None:
        """The first control token in the texts of `value` (messages, tools, any nesting), or None."""
        for text in _texts(value):
            if found := self._pattern.search(text):
                return found[0]
        return None


def _texts(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
