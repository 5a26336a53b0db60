# SPDX-License-Identifier: Apache-2.0
"""A trained draft head as the folder that vLLM, SGLang and TensorRT-LLM serve.

In: a head. Out: a folder with `config.json`, `model.safetensors` and a model card. It is read back
and checked before it gets its final name. Cost: the head's weights once, in memory and on disk.

config.json has the aux layers in two numberings. vLLM reads the top-level list as it is (id i
enters layer i); SGLang reads the nested list and adds 1, so each id there is one less. Nothing is
copied from the target's config, since engines fail on keys and nulls that they do not expect.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from shared.artifacts.manifest import MANIFEST
from shared.artifacts.unfinished import IDENTITY, LOCK
from shared.contracts.exported_head import DTYPES, check_export, config_json
from shared.contracts.head_config import HeadConfig
from shared.contracts.head_variant import CLASSIC
from shared.errors import UserError
from shared.io.files import atomic_folder, write_json, write_text
from stages.train.export.speculators import speculators_config, speculators_name
from stages.train.model import DraftHead


def export_head(
    head: DraftHead,
    out: Path,
    *,
    target: str,
    provenance: Mapping[str, Any],
    dtype: str = "bfloat16",
    num_draft_tokens: int = 3,
    name: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    target_architectures: Sequence[str] | None = None,
) -> None:
    """Write the head to the folder `out`; what is there is replaced once the new one is complete.

    Args:
        target: name or path of the target, for the model card's command.
        provenance: how the head was made, JSON values for the card.
        dtype: of the weights, `bfloat16` or `float32`.
        num_draft_tokens: K of the model card's command.
        name: the folder in that command, if it will be moved; default `out.name`.
        template_kwargs: the chat template's switches that the head was trained with.
        target_architectures: of the target's config.json; given, the layout is the speculators library's.

    Raises:
        OutputError: the tensors are not exactly those that engines load.
    """
    config = config_json(head.config, dtype=dtype)
    rename: Callable[[str], str] = str if target_architectures is None else speculators_name
    if target_architectures is not None:
        config = speculators_config(
            head.config,
            dtype=dtype,
            target=target,
            target_architectures=target_architectures,
            num_draft_tokens=num_draft_tokens,
        )
    card = model_card(
        head.config,
        target=target,
        provenance=provenance,
        name=name or out.name,
        num_draft_tokens=num_draft_tokens,
        template_kwargs=template_kwargs or {},
    )
    with atomic_folder(out) as folder:
        write_json(folder / "config.json", config)
        _write_weights(head, rename, DTYPES[dtype], folder / "model.safetensors")
        write_text(folder / "README.md", card)
        if target_architectures is None:
            check_export(folder)


def _write_weights(
    head: DraftHead, rename: Callable[[str], str], dtype: torch.dtype, path: Path
) -> None:
    """Write a safetensors file that other users may read.

    Raises:
        OSError: the disk is full.
    """
    weights = {
        rename(name): tensor.detach()
        .to("cpu", dtype if tensor.is_floating_point() else None)
        .contiguous()
        for name, tensor in head.state_dict().items()
    }
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:  # raised for a full disk
        raise OSError(str(error)) from error
    # safetensors sets 0600; another user's container or another node could not serve the file.
    path.chmod(0o644)


def require_replaceable(out: Path) -> None:
    """Refuse to replace anything but an earlier export.

    Raises:
        UserError: something else is there.
    """
    own = {"config.json", "model.safetensors", "README.md", MANIFEST, IDENTITY, LOCK}
    is_folder = out.is_dir() and not out.is_symlink()
    names = sorted(path.name for path in out.iterdir()) if is_folder else []
    foreign = [name for name in names if name not in own or "model.safetensors" not in names]
    if foreign or (out.exists() and not is_folder) or not out.absolute().name:
        raise UserError(
            f"train.output: expected no folder or an earlier export at {out}, found "
            f"{foreign[0] if foreign else 'something else'}.",
            code="export-folder-taken",
            remedy="Set train.output to another folder.",
            facts={"folder": str(out), "found": foreign[:3]},
        )


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


def model_card(
    config: HeadConfig,
    *,
    target: str,
    provenance: Mapping[str, Any],
    name: str,
    num_draft_tokens: int,
    template_kwargs: Mapping[str, Any],
) -> str:
    """README.md of the exported folder: what it is, how to serve it, how it was made."""
    settings = {"method": "eagle3", "model": name, "num_speculative_tokens": num_draft_tokens}
    if config.variant.parallel:
        settings["parallel_drafting"] = True
    speculative = json.dumps(settings)
    switches = ""
    if template_kwargs:
        switches = f" --default-chat-template-kwargs '{json.dumps(dict(template_kwargs))}'"
    history = json.dumps(dict(provenance), indent=2, ensure_ascii=False, default=str)
    return f"""---
base_model: {json.dumps(target)}
tags: [eagle3, speculative-decoding]
---

# {config.variant.name} draft head for {target}

It proposes tokens that the target verifies: equal output, fewer target steps. It serves this
target alone, and knows {config.draft_vocab_size} of its {config.vocab_size} tokens.

    vllm serve {target} --speculative-config '{speculative}'{switches}

`{name}` is the path of this folder. {_engines(config)}
Aux layers (id i is the state that enters layer i): {list(config.aux_layers)}.

## How it was made

```json
{history}
```
"""
