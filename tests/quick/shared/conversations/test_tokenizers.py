# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of other kinds than byte-level BPE: pure Python's, SentencePiece's, a prefix space's."""

import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.config import RunConfig
from shared.conversations.reader import ConversationReader
from shared.prompts.rows import parse_row
from tests.models import CHAT_TEMPLATE

TOKENS = ["<|im_start|>", "<|im_end|>"]
SAID = {
    "two turns": ["A sequence.", "Another one."],
    "mark-up": ["What <b>x</b> does: it makes x bold."],
    "scripts": ["مرحبا 👋🏽 café"],
    "spaces": ["  two spaces first\n\nand  two lines"],
    "code": ["def f():\n\treturn {'a': 1}"],
}


def _python(_: Path) -> Any:
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def _model(folder: Path) -> Path:
    """A SentencePiece model with byte fallback, learnt from Python's own help texts."""
    from sentencepiece import SentencePieceTrainer

    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())][:20]
    with (folder / "tokenizer.model").open("wb") as stream:
        SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(texts).splitlines()),
            model_writer=stream,
            model_type="bpe",
            vocab_size=600,
            byte_fallback=True,
            pad_id=3,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return folder / "tokenizer.model"


def _sentencepiece(folder: Path) -> Any:
    from transformers import GPTSw3Tokenizer

    return GPTSw3Tokenizer(str(_model(folder)))


def _prefix_space(folder: Path) -> Any:
    from transformers import LlamaTokenizer

    _model(folder)
    return LlamaTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("make", [_python, _sentencepiece, _prefix_space])
def test_answers_are_trained_to_the_character(make: Callable[[Path], Any], tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    tokenizer.chat_template = CHAT_TEMPLATE
    reader = ConversationReader(tokenizer, RunConfig(target="t"), "skip")
    for name, answers in SAID.items():
        turns = [
            {"role": role, "content": text}
            for answer in answers
            for role, text in (("user", "What is it?"), ("assistant", answer))
        ]
        (row,) = reader.rows(parse_row({"id": name, "messages": turns}))
        spans = [row.input_ids[start:end] for start, end in row.loss_spans]
        decoded = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in spans]
        expected = ["".join(f"{answer}<|im_end|>".split()) for answer in answers]
        assert ["".join(text.split()) for text in decoded] == expected
