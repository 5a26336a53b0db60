# SPDX-License-Identifier: Apache-2.0
"""Would the target answer a row? What synth and dump find out while they work, asked beforehand.

In: rows, and the target's tokenizer where it lies here. Costs seconds to load it. A row whose bytes have
room, each of them a token, is not tokenised, and of the others only the first ones are.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.config import RunConfig
from shared.conversations.reader import TOO_LONG, ConversationReader, Refused, answered_turns
from shared.conversations.template import ChatTemplate, TemplateMismatch
from shared.errors import UserError
from shared.paths import find_input
from shared.prompts.rows import Message, Prompt
from shared.target.special_tokens import REASON, SpecialTokens
from shared.target.tokenizer import load_chat_tokenizer
from stages.ops.chain.processes import Step

# What a template may write around the messages.
_TEMPLATE_TOKENS = 1_000
# So many rows are tokenised: a second or two.
_MAX_TOKENIZED = 2_000
# With these, a server of synth's makes other tokens of a text than the target's own files say.
_OTHER_TOKENS = {"tokenizer", "tokenizer-mode"}


def most_tokens(messages: Sequence[Message], tools: Sequence[Any]) -> range:
    """As many as a prompt can have, counted without a tokenizer."""
    return range(len(str((messages, tools)).encode()) + _TEMPLATE_TOKENS)


class Asked:
    """A stage's rows as the target will take them."""

    def __init__(self, step: Step, mode: str, workspace: Path) -> None:
        """Load nothing yet.

        Args:
            mode: synth's, or conversations for those that dump reads.
        """
        self._settings, self._mode, self._workspace = step.settings, mode, workspace
        self._run = RunConfig.model_validate(step.run)
        self._folder = find_input(step.target, workspace)
        self._tokenized = 0

    def reason(self, prompt: Prompt) -> str | None:
        """Why nothing comes of a row; "" where something does, None where nobody looked."""
        if self._mode in ("keep", "conversations"):
            return self._of_answered(prompt)
        if self._mode == "complete":
            if any(turn.answer is None for turn in prompt.turns[:-1]):
                return "unanswered_turn"
            messages = prompt.messages
        else:  # a later turn that cannot be asked ends the conversation: what was answered stays
            messages = prompt.turns[0].asked
        if self._special and self._special.first_in([messages, prompt.tools]):
            return REASON
        return self._of_length(messages, prompt.tools)

    def _of_answered(self, prompt: Prompt) -> str | None:
        try:
            answered_turns(prompt)
            if self._reader is None or not self._may_tokenize():
                return None
            self._reader.rows(prompt)
        except Refused as refused:
            return refused.reason
        return ""

    def _of_length(self, messages: Sequence[Message], tools: Sequence[Any]) -> str | None:
        limit = self._run.max_length_tokens
        if self._settings["endpoints"] or _OTHER_TOKENS & set(self._settings["server_args"]):
            return None  # an endpoint may take more
        if len(most_tokens(messages, tools)) < limit:
            return ""
        if self._template is None or not self._may_tokenize():
            return None
        try:
            # vLLM wants room for one token of the answer.
            return TOO_LONG if len(self._template.prompt_ids(messages, tools)) >= limit else ""
        except TemplateMismatch:  # the server may render it all the same
            return None

    def _may_tokenize(self) -> bool:
        self._tokenized += 1
        return self._tokenized <= _MAX_TOKENIZED

    @functools.cached_property
    def _tokenizer(self) -> Any:
        """None where there is none to ask: on a hub, damaged, or in the ops image, without transformers."""
        if self._folder is None:
            return None
        try:
            return load_chat_tokenizer(self._folder, self._run, self._workspace)
        except (UserError, ModuleNotFoundError):
            return None

    @functools.cached_property
    def _special(self) -> SpecialTokens | None:
        is_asked = self._settings["special_token_text"] == "skip" and self._tokenizer is not None
        return SpecialTokens(self._tokenizer) if is_asked else None

    @functools.cached_property
    def _template(self) -> ChatTemplate | None:
        if self._tokenizer is None:
            return None
        return ChatTemplate(self._tokenizer, self._run.template_kwargs)

    @functools.cached_property
    def _reader(self) -> ConversationReader | None:
        if self._tokenizer is None:
            return None
        policy, more = self._settings["special_token_text"], self._settings.get("reasoning_end")
        given = (more,) if more else ()
        return ConversationReader(self._tokenizer, self._run, policy, *given)
