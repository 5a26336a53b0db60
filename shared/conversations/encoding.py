# SPDX-License-Identifier: Apache-2.0
"""Answers that are known by their characters, as ranges of token ids that are theirs alone."""

import dataclasses
import itertools
import unicodedata
from collections.abc import Sequence

from shared.conversations.template import ChatTemplate, TemplateMismatch

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Characters:
    """Where an answer stands in the rendered text.

    Attributes:
        message: index of the answer.
        prompt_end: where the engine's prompt for it ends; None if the text does not begin with that.
    """

    message: int
    start: int
    end: int
    prompt_end: int | None


def encoded(
    template: ChatTemplate, text: str, answers: Sequence[Characters]
) -> tuple[tuple[int, ...], tuple[Span, ...]]:
    """The text's token ids, and each answer's range of them.

    A token may reach over the border between a prompt that ends in a space and its answer. The text is
    then encoded in two parts there, as the engine has it: it gets the prompt's tokens and adds its own.

    Raises:
        TemplateMismatch: an answer's tokens are not its own, or do not spell it.
    """
    encoding = _Encoding(template, text, [])
    for answer in answers:
        at_prompt = answer.prompt_end == answer.start
        if encoding.index(answer.start) is None and at_prompt:
            encoding = _Encoding(template, text, [*encoding.cuts, answer.start])
    if encoding.cuts and template.text(encoding.ids) != template.text(template.ids(text)):
        raise TemplateMismatch("a token reaches over an answer's edge")
    return tuple(encoding.ids), tuple(encoding.span(answer) for answer in answers)


class _Encoding:
    """Token ids of a text that is encoded in parts, parted at `cuts`."""

    def __init__(self, template: ChatTemplate, text: str, cuts: list[int]) -> None:
        self._template, self._text, self.cuts = template, text, cuts
        self.ids = self._ids(len(text))

    def _ids(self, end: int) -> list[int]:
        edges = [0, *(cut for cut in self.cuts if cut < end), end]
        parts = [self._text[a:b] for a, b in itertools.pairwise(edges)]
        return [token for part in parts for token in self._template.ids(part)]

    def index(self, position: int) -> int | None:
        """How many tokens end at this character; None where one reaches over it."""
        ids = self._ids(position)
        return len(ids) if self.ids[: len(ids)] == ids else None

    def span(self, answer: Characters) -> Span:
        """The answer's tokens.

        A token that joins the white space before an answer with its first word is the answer's.
        """
        starts = [answer.start]
        if answer.prompt_end is not None and self._text[answer.prompt_end : answer.start].isspace():
            starts.append(answer.prompt_end)
        first = next((at for at in map(self.index, starts) if at is not None), None)
        last = self.index(answer.end)
        where = f"message {answer.message}"
        if first is None or last is None:
            raise TemplateMismatch(f"{where}: a token reaches over the answer's edge")
        text = self._template.text(self.ids[first:last])
        if _plain(text) != _plain(self._text[answer.start : answer.end]):
            raise TemplateMismatch(f"{where}: its tokens do not spell its text")
        return first, last


def _plain(text: str) -> str:
    """Text without what tokenizers do not keep: white space, and forms of one letter (Qwen's NFC)."""
    return "".join(unicodedata.normalize("NFKC", text).split())
