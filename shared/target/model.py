# SPDX-License-Identifier: Apache-2.0
"""The target as files: its config, the three tensors that others need, its weights' hash.

Nothing here loads the whole model. Its tokenizer is `shared/target/tokenizer.py`'s.
"""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.config import RunConfig
from shared.errors import RetryableError, UserError
from shared.io.files import read_json, require_file
from shared.io.safetensors_files import read_tensor
from shared.paths import find_input

if TYPE_CHECKING:
    import torch

_EMBEDDING = ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight")
_FINAL_NORM = ("model.norm.weight", "language_model.model.norm.weight")
_LM_HEAD = ("lm_head.weight", "language_model.lm_head.weight")
# Norms that multiply by 1 + weight instead of weight.
_UNIT_OFFSET_NORMS = ("gemma", "gemma2", "gemma3", "gemma3_text")


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """What the stages need to know of the target's config.json (its text part, for a VLM)."""

    folder: Path
    raw: dict[str, Any]
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int

    @property
    def logit_scale(self) -> float:
        """Factor on the logits (cohere's logit_scale, granite's 1/logits_scaling)."""
        if scaling := self.raw.get("logits_scaling"):
            return 1.0 / float(scaling)
        return float(self.raw.get("logit_scale") or 1.0)

    @property
    def logit_softcap(self) -> float | None:
        """C of c * tanh(logits / c), or None."""
        value = self.raw.get("final_logit_softcapping")
        return float(value) if value else None


def locate(
    target: str, workspace: Path, *, revision: str | None, label: str = "run.target"
) -> Path:
    """A model's folder: in the workspace, here, or in the hub's cache (downloaded if need be).

    Raises:
        UserError: no such folder and no such hub id.
        RetryableError: the hub cannot be reached.
    """
    found = find_input(target, workspace)
    if found is not None:
        if not found.is_dir():
            raise UserError(f"{label}: expected a model's folder, found the file {found}.")
        return found
    if target.count("/") != 1 or target.startswith((".", "/")):
        raise UserError(
            f"{label}: expected a model's folder at {workspace / target} or "
            f"{Path(target).absolute()}, or a hub id (organisation/name); found neither."
        )
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        return Path(huggingface_hub.snapshot_download(target, revision=revision))
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as error:
        raise UserError(f"{label}: {target} is no folder, and the hub says: {error}") from error
    except (hub.LocalEntryNotFoundError, OSError) as error:
        raise RetryableError(
            f"{label}: {target} is no folder here, and the hub could not be reached ({error}). "
            "Check the name, the network, or HF_HOME for a filled cache."
        ) from error


def locate_trained(run: RunConfig, workspace: Path) -> Path:
    """The target whose states are dumped and trained on: a quantised one's original.

    Raises:
        UserError, RetryableError: as `locate`.
    """
    if run.target_train is not None:
        return locate(run.target_train, workspace, revision=None, label="run.target_train")
    return locate(run.target, workspace, revision=run.target_revision)


def read_config(folder: Path) -> TargetConfig:
    """The target's config.json.

    Raises:
        UserError: missing, not JSON, or without the sizes that every decoder has.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a model's config, found {type(raw).__name__}.")
    inner = raw.get("text_config")
    text: dict[str, Any] = inner if isinstance(inner, dict) else raw
    try:
        return TargetConfig(
            folder=folder,
            raw=text,
            model_type=str(text.get("model_type", "")),
            num_layers=int(text["num_hidden_layers"]),
            hidden_size=int(text["hidden_size"]),
            vocab_size=int(text["vocab_size"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: expected num_hidden_layers, hidden_size and vocab_size: {error!r}"
        ) from error


@dataclasses.dataclass(frozen=True)
class TargetTensors:
    """The tensors between hidden states and tokens."""

    embed_tokens: "torch.Tensor"  # [V, H]
    norm_weight: "torch.Tensor"  # [H], the effective factor (1 + w already added for gemma)
    lm_head: "torch.Tensor"  # [V, H]
    norm_eps: float


def _expect(
    tensor: "torch.Tensor | None", names: tuple[str, ...], config: TargetConfig
) -> "torch.Tensor":
    if tensor is None or tensor.shape[-1] != config.hidden_size:
        raise UserError(
            f"{config.folder}: expected the tensor {names[0]} with last dimension "
            f"{config.hidden_size}, found {None if tensor is None else list(tensor.shape)}."
        )
    return tensor


def read_tensors(config: TargetConfig) -> TargetTensors:
    """Embedding, final norm and lm_head; lm_head is the embedding where the target ties them.

    Raises:
        UserError: a name is missing, or a shape does not fit the config.
    """
    embed = read_tensor(config.folder, _EMBEDDING)
    norm = read_tensor(config.folder, _FINAL_NORM)
    lm_head = read_tensor(config.folder, _LM_HEAD)
    if lm_head is None and config.raw.get("tie_word_embeddings", False):
        lm_head = embed
    embed = _expect(embed, _EMBEDDING, config)
    norm = _expect(norm, _FINAL_NORM, config)
    lm_head = _expect(lm_head, _LM_HEAD, config)
    if config.model_type in _UNIT_OFFSET_NORMS:
        norm = norm.float() + 1.0
    eps = float(config.raw.get("rms_norm_eps") or 1e-6)
    return TargetTensors(embed, norm, lm_head, eps)


def weights_hash(folder: Path) -> str:
    """A hash that changes when the target does: names, sizes, headers and edges of each file.

    Reading 140 GB for a fingerprint would take minutes on every start; a safetensors header holds
    every name, shape and place, and the first and last MiB of the data stand for the rest.
    """
    require_file(folder / "config.json")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        require_file(path)
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as handle:
            digest.update(handle.read(1 << 20))
            handle.seek(max(0, size - (1 << 20)), os.SEEK_SET)
            digest.update(handle.read(1 << 20))
    return digest.hexdigest()
