# SPDX-License-Identifier: Apache-2.0
"""Mode `keep`: the rows' own answers, tokenised and masked by the target's chat template.

No server, no GPU. Off-policy: the target would have said something else, so expect less acceptance
than from regenerated answers.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.contracts.conversations import Conversation
from shared.prompts.rows import Message, Prompt
from shared.target.special_tokens import REASON, SpecialTokens
from shared.target.templates import TemplateMismatch, tokenize_conversation
from shared.target.tokenizer import load_tokenizer
from stages.synth.client import Outcome
from stages.synth.config import SynthConfig
from stages.synth.play import Refused, as_text


class Keeper:
    """Turns prompts that have answers into rows."""

    def __init__(self, config: SynthConfig, target: Path) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(target, trust_remote_code=config.run.trust_remote_code)
        skips = config.special_token_text == "skip"
        self._special = SpecialTokens(self.tokenizer) if skips else None

    def keep(self, prompt: Prompt) -> Outcome:
        """One row, or one a turn where the template shows earlier answers otherwise."""
        answered = [turn for turn in prompt.turns if turn.answer is not None]
        if not answered or prompt.turns[: len(answered)] != tuple(answered):
            return Outcome(prompt, refused=Refused("no_answer", "mode keep needs the row's own"))
        said = dataclasses.replace(prompt, turns=tuple(answered)).conversation
        messages = [self._shown(message) for message in said]
        if self._special and (token := self._special.first_in([messages, prompt.tools])):
            return Outcome(prompt, refused=Refused(REASON, token))
        try:
            rows = list(self._rows(prompt, messages))
        except TemplateMismatch as mismatch:
            return Outcome(prompt, refused=Refused("template_mismatch", str(mismatch)[:500]))
        if not rows:
            return Outcome(prompt, refused=Refused("empty_answer", "no token of it is an answer"))
        return Outcome(prompt, tuple(rows))

    def _shown(self, message: Message) -> Message:
        if self.config.run.reasoning == "keep" or "reasoning_content" not in message:
            return message
        return {key: value for key, value in message.items() if key != "reasoning_content"}

    def _rows(self, prompt: Prompt, messages: list[Message]) -> Iterator[Conversation]:
        tools: Any = prompt.tools or None
        try:
            ids, spans = tokenize_conversation(self.tokenizer, messages, tools)
        except TemplateMismatch:
            ends = [i + 1 for i, each in enumerate(messages) if each["role"] == "assistant"]
            if len(ends) == 1:
                raise
            for turn, end in enumerate(ends):
                said = messages[:end]
                ids, spans = tokenize_conversation(self.tokenizer, said, tools, last_only=True)
                if spans:
                    yield _row(prompt, f"{prompt.sample_id}/{turn}", said, ids, spans)
            return
        if spans:
            yield _row(prompt, prompt.sample_id, messages, ids, spans)


def _row(
    prompt: Prompt,
    sample_id: str,
    messages: list[Message],
    ids: tuple[int, ...],
    spans: tuple[tuple[int, int], ...],
) -> Conversation:
    return Conversation(
        sample_id=sample_id,
        conversation_id=prompt.sample_id,
        source=prompt.source,
        category=prompt.category,
        messages=as_text(messages),
        input_ids=ids,
        loss_spans=spans,
        finish_reason="kept",
        num_prompt_tokens=spans[0][0],
        num_completion_tokens=sum(end - start for start, end in spans),
    )
