# SPDX-License-Identifier: Apache-2.0
"""README.md of an exported head: what it is, how to serve it, how it was made."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.contracts.head_config import HeadConfig
from shared.contracts.head_variant import CLASSIC
from shared.target.origin import read_origin
from shared.vllm.server import flags

# What tells an export of ours from other models: every card has had it, in these words.
MARK = "It proposes tokens that the target verifies: equal output, fewer target steps."


def _engines(config: HeadConfig) -> str:
    """Which engines serve this variant."""
    if config.variant == CLASSIC:
        return "SGLang takes it with `--speculative-algorithm EAGLE3`."
    if config.variant.parallel:
        return (
            "One forward pass drafts all tokens, which vLLM must be told by `parallel_drafting`; norms "
            "and a window need vLLM 0.32 or later. No other engine was seen to serve such a head."
        )
    return (
        "Its norms or its window need vLLM 0.32 or later, or an engine that reads the same keys of "
        "config.json; one that does not know them ignores them without a word, and accepts less."
    )


def _named(target: str, folder: Path | None) -> tuple[str, str, str]:
    """(what the target is called, what `vllm serve` takes, a sentence about a target of no hub)."""
    origin = read_origin(folder) if folder else None
    if folder is None or (origin and origin.is_on_hub):
        name = origin.source if origin else target
        return name, name, ""
    made = f", made from {origin.source}" if origin else ""
    about = (
        f"`TARGET` is the path of the target: where the head was trained, a folder named "
        f"`{folder.name}`{made}. No model of the hub is known to be the same. "
    )
    return f"the local model {folder.name}", "TARGET", about


def model_card(
    config: HeadConfig,
    *,
    target: str,
    target_folder: Path | None,
    provenance: Mapping[str, Any],
    name: str,
    num_draft_tokens: int,
    serving: Mapping[str, Any],
) -> str:
    """The page.

    Args:
        target_folder: where the target lies, if it is a folder of this machine; its path means nothing
            elsewhere, so the page says where it came from.
        serving: what vLLM must be told so that it renders chats as the training's were, by its options'
            names; `chat-template` is a file, or a name that the target gives one.
    """
    called, serves, about = _named(target, target_folder)
    base_model = "" if about else f"base_model: {json.dumps(called)}\n"
    settings = {"method": "eagle3", "model": name, "num_speculative_tokens": num_draft_tokens}
    if config.variant.parallel:
        settings["parallel_drafting"] = True
    options = {"speculative-config": settings, **serving}
    if about:  # a folder has no revisions
        options["revision"] = None
    if template := options.get("chat-template"):
        options["chat-template"] = "TEMPLATE"
        about += (
            f"`TEMPLATE` is the file of the chat template that the run was given, `{template}`. "
        )
    command = shlex.join(["vllm", "serve", serves, *flags(options)])
    history = json.dumps(dict(provenance), indent=2, ensure_ascii=False, default=str)
    return f"""---
{base_model}tags: [eagle3, speculative-decoding]
---

# {config.variant.name} draft head for {called}

{MARK} It serves this
target alone, and knows {config.draft_vocab_size} of its {config.vocab_size} tokens.

    {command}

{about}`{name}` is the path of this folder. {_engines(config)}
Aux layers (id i is the state that enters layer i): {list(config.aux_layers)}.

## How it was made

```json
{history}
```
"""
