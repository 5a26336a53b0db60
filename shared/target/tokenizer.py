# SPDX-License-Identifier: Apache-2.0
"""The target's tokenizer: loaded with the run's chat template, and told apart by hashes."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from shared.config import RunConfig
from shared.errors import UserError
from shared.io.files import require_file
from shared.target.templates import TEMPLATE_PATTERNS, find_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a vocabulary can lie in, besides tokenizer.json: SentencePiece, BPE, tiktoken, tekken, WordPiece.
_VOCABULARY_PATTERNS = ("*.model", "*.tiktoken", "tekken.json", "*vocab*", "*merges*", "*.py")
_SETTINGS_PATTERNS = ("*token*.json", "*tokenizer*", *TEMPLATE_PATTERNS)
_NEVER = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npy"}


def tokenizer_hash(folder: Path) -> str:
    """A hash of every file that the tokenizer and its chat templates consist of; '' without any."""
    return _hash_of(folder, (*_VOCABULARY_PATTERNS, *_SETTINGS_PATTERNS))


def vocabulary_hash(folder: Path) -> str:
    """A hash of which text has which token id: equal for a model and its quantised copies.

    Raises:
        UserError: there is no vocabulary.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        if found := _hash_of(folder, _VOCABULARY_PATTERNS):
            return found
        raise UserError(
            f"{folder}: expected a tokenizer, found no file of one.",
            code="no-tokenizer",
            remedy="Put the target's tokenizer.json or tokenizer.model there.",
            facts={"target": str(folder)},
        )
    from tokenizers import Tokenizer

    vocabulary = sorted(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def _hash_of(folder: Path, patterns: tuple[str, ...]) -> str:
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    paths = sorted(path for path in found if path.is_file() and path.suffix not in _NEVER)
    digest = hashlib.sha256()
    for path in paths:
        require_file(path)
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest() if paths else ""


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """The target's tokenizer.

    Raises:
        UserError: its files do not load, or want code of their own that the recipe does not trust.
    """
    # Here, not above: it takes seconds, and a finished stage must not wait for it.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken tokenizer.json raises no narrower one
        raise UserError(
            f"{folder}: expected a tokenizer that loads, found: {error}.",
            code="tokenizer-does-not-load",
            remedy="Restore tokenizer.json and tokenizer_config.json; run.trust_remote_code allows "
            "a tokenizer with its own code.",
            facts={"target": str(folder)},
        ) from error


def load_chat_tokenizer(folder: Path, run: RunConfig, workspace: Path) -> "PreTrainedTokenizerBase":
    """The target's tokenizer with the chat template that the run uses.

    Raises:
        UserError: the tokenizer does not load, or there is no such template.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=run.trust_remote_code)
    if run.chat_template or not isinstance(getattr(tokenizer, "chat_template", None), str):
        tokenizer.chat_template = find_template(folder, run.chat_template, workspace)
    return tokenizer
