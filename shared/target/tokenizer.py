# SPDX-License-Identifier: Apache-2.0
"""The target's tokenizer and chat template: that they are there, loaded, and told apart by hashes."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import UserError
from shared.io.files import read_json, require_file, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_hash(folder: Path) -> str:
    """A hash of the tokenizer's files and the chat template."""
    digest = hashlib.sha256()
    for name in (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        path = folder / name
        if path.exists():
            require_file(path)
            digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()


def vocabulary_hash(folder: Path) -> str:
    """A hash of which text has which token id: equal for a model and its quantised copies."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return sha256(folder / "tokenizer.model") if (folder / "tokenizer.model").exists() else ""
    from tokenizers import Tokenizer

    vocabulary = sorted(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


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
            f"{folder}: expected a tokenizer that loads, found: {error}. Restore tokenizer.json and "
            "tokenizer_config.json; run.trust_remote_code allows a tokenizer with its own code."
        ) from error


def require_chat_template(folder: Path) -> None:
    """Refuse a target that cannot turn messages into tokens.

    Raises:
        UserError: neither chat_template.jinja nor a template in tokenizer_config.json.
    """
    if (folder / "chat_template.jinja").exists():
        return
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    if not isinstance(config, dict) or not config.get("chat_template"):
        raise UserError(
            f"{folder}: expected a chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json), found none. Put the model family's template there: without "
            "one, messages cannot become tokens."
        )
