# SPDX-License-Identifier: Apache-2.0
"""A trained draft head as the folder that vLLM, SGLang and TensorRT-LLM serve.

In: a head. Out: a folder with `config.json`, `model.safetensors` and a model card. It is read back
and checked before it gets its final name. Cost: the head's weights once, in memory and on disk.

config.json has the aux layers in two numberings. vLLM reads the top-level list as it is (id i
enters layer i); SGLang reads the nested list and adds 1, so each id there is one less. Nothing is
copied from the target's config, since engines fail on keys and nulls that they do not expect.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from shared.artifacts.manifest import MANIFEST
from shared.artifacts.unfinished import IDENTITY, LOCK
from shared.contracts.exported_head import DTYPES, check_export, config_json
from shared.errors import UserError
from shared.io.files import atomic_folder, read_json, read_text, write_json, write_text
from stages.train.export.card import MARK, model_card
from stages.train.export.speculators import speculators_config, speculators_name
from stages.train.model import DraftHead


def export_head(
    head: DraftHead,
    out: Path,
    *,
    target: str,
    target_folder: Path | None = None,
    provenance: Mapping[str, Any],
    dtype: str = "bfloat16",
    num_draft_tokens: int = 3,
    name: str | None = None,
    serving: Mapping[str, Any] | None = None,
    target_architectures: Sequence[str] | None = None,
) -> None:
    """Write the head to the folder `out`; what is there is replaced once the new one is complete.

    Args:
        target: name or path of the target.
        target_folder: where it lies, if it is a folder of this machine; None for a model of the hub.
        provenance: how the head was made, JSON values for the card.
        dtype: of the weights, `bfloat16` or `float32`.
        num_draft_tokens: K of the model card's command.
        name: the folder in that command, if it will be moved; default `out.name`.
        serving: vLLM's further options in that command, as `model_card` takes them.
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
        target_folder=target_folder,
        provenance=provenance,
        name=name or out.name,
        num_draft_tokens=num_draft_tokens,
        serving=serving or {},
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


def require_replaceable(out: Path, own: Path) -> None:
    """Refuse to replace anything but an earlier export.

    Args:
        own: the run's `export/`; that of another run belongs to its manifest, and is not replaced.

    Raises:
        UserError: something else is there.
    """
    if foreign := _foreign(out, own):
        raise UserError(
            f"--output: expected no folder or an earlier export at {out}, found {foreign}.",
            code="export-folder-taken",
            remedy="Give another folder as --output.",
            facts={"folder": str(out), "found": foreign},
        )


def _foreign(out: Path, own: Path) -> str:
    """What no export of ours holds, or lacks; '' where there is nothing to lose."""
    if not out.absolute().name or out.is_symlink() or (out.exists() and not out.is_dir()):
        return "something else"
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    expected = {"config.json", "model.safetensors", "README.md"}
    of_a_run = {MANIFEST, IDENTITY, LOCK} if out.resolve() == own.resolve() else set()
    if others := sorted(names - expected - of_a_run):
        return others[0]
    if not names:
        return ""
    if missing := sorted(expected - names):
        return f"{sorted(names)[0]} and no {missing[0]}"
    # Every card of ours has the sentence; both files, since a card may lie in the folder of another model.
    try:
        if MARK not in read_text(out / "README.md"):
            return "another README.md"
        config = read_json(out / "config.json")
    except UserError as error:
        return f"another model ({error.problem.rstrip('.')})"
    is_head = isinstance(config, dict) and "eagle_aux_hidden_state_layer_ids" in config
    return "" if is_head else "another model's config.json"
