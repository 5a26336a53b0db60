# SPDX-License-Identifier: Apache-2.0
"""Which chats bench can measure on: those that it would refuse must not be held out.

In: what bench makes of the recipe. Costs the tokenisation of the chats that are asked about. Of a target on
the hub only the tokenizer's files are fetched.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.config import RunConfig
from shared.conversations.switches import template_variables
from shared.conversations.template import ChatTemplate, TemplateMismatch
from shared.errors import UserError
from shared.paths import find_input
from shared.prompts.rows import Prompt
from shared.target import hub
from shared.target import model as target
from shared.target.tokenizer import load_chat_tokenizer
from shared.vllm.measured_rows import check_warmup, conversation_of, longest_row

_TOKENIZER_FILES = [
    "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "additional_chat_templates/*",
]  # fmt: skip


class Room:
    """What a chat has to fit into.

    Args:
        settings: bench's, as it says itself.
    """

    def __init__(self, settings: Mapping[str, Any], workspace: Path) -> None:
        self.run = RunConfig(**settings["run"])
        self.answer_tokens = max(settings["max_tokens"])
        self.drafted_tokens = max(settings["num_speculative_tokens"])
        self._workspace = workspace

    def as_dict(self) -> dict[str, int]:
        """What decides, beside the target."""
        return {"max_tokens": self.answer_tokens, "num_speculative_tokens": self.drafted_tokens}

    @property
    def variables(self) -> set[str] | None:
        """What the run's chat template reads; None where that cannot be told.

        Raises:
            UserError: there is no such target or template.
        """
        return template_variables(self._folder, self.run, self._workspace)

    def fits(self, prompt: Prompt) -> bool:
        """Whether bench takes a chat.

        Raises:
            UserError: the target has no readable config or tokenizer.
        """
        template, limit, found = self._template, self._limit, [conversation_of(prompt)]
        try:
            check_warmup(found)
            longest_row(
                found,
                template.prompt_ids,
                max_tokens=self.answer_tokens,
                num_speculative_tokens=self.drafted_tokens,
                limit=limit,
            )
        except (UserError, TemplateMismatch):
            return False
        return True

    @functools.cached_property
    def _folder(self) -> Path:
        name, revision = self.run.target, self.run.target_revision
        if find_input(name, self._workspace) is not None:
            return target.locate(name, self._workspace, revision=revision)
        hub.require_id(name, self._workspace)
        return hub.fetch(name, revision, patterns=_TOKENIZER_FILES)

    @functools.cached_property
    def _limit(self) -> int | None:
        limit = target.read_config(self._folder).raw.get("max_position_embeddings")
        return int(limit) if limit else None

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        tokenizer = load_chat_tokenizer(self._folder, self.run, self._workspace)
        return ChatTemplate(tokenizer, self.run.template_kwargs)
