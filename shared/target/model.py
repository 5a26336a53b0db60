# SPDX-License-Identifier: Apache-2.0
"""The target as files: where it is, its config, its weights' hash.

What it computes between its last layer and its logits is `adapter.py`'s, its tokenizer
`tokenizer.py`'s.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.config import RunConfig
from shared.errors import UserError
from shared.io.files import read_json, require_file
from shared.paths import find_input

# Where configs of vision and speech models keep that of the model that answers in text.
_TEXT_PARTS = ("thinker_config", "text_config", "llm_config", "language_config", "language_model")
_SIZES = ("num_hidden_layers", "hidden_size", "vocab_size")
# What everybody looks up by its name, or item by item.
_KINDS = {"model_type": str, "architectures": list, "layer_types": list, "layers_block_type": list}


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """What the stages need to know of the target's config.json.

    Attributes:
        raw: its text part, as it stands in the file; the whole file for a text model.
        whole: the whole file.
        trust_remote_code: whether Python code beside the weights may be run.
    """

    folder: Path
    raw: dict[str, Any]
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    whole: dict[str, Any] = dataclasses.field(default_factory=dict)
    trust_remote_code: bool = False

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The file and its nested configs, down to the text part."""
        return list(_text_parts(self.whole or self.raw))

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """`raw` with its class's own values for all that the file leaves out.

        Costs the import of transformers.

        Raises:
            UserError: no class of transformers takes this config.
        """
        from shared.target.classes import settings

        return settings(self)

    @functools.cached_property
    def known_settings(self) -> dict[str, Any]:
        """`settings`; what the file itself says where no class of transformers takes it."""
        try:
            return self.settings
        except UserError:
            return {key: value for key, value in self.raw.items() if value is not None}


def locate(
    target: str,
    workspace: Path,
    *,
    revision: str | None,
    label: str = "run.target",
    is_head: bool = False,
) -> Path:
    """A model's folder: in the workspace, here, or in the hub's cache (downloaded if need be).

    Args:
        is_head: whether it is a draft head that is looked for, not a target.

    Raises:
        UserError: no such folder and no such hub id.
        RetryableError: the hub cannot be reached.
    """
    found = find_input(target, workspace)
    if found is not None:
        if not found.is_dir():
            raise UserError(
                f"{label}: expected a folder, found the file {found}.",
                code="target-not-a-folder",
                remedy="Name the folder that holds its config.json.",
                facts={"path": str(found)},
            )
        return found
    from shared.target import hub

    hub.require_id(target, workspace, label=label, is_head=is_head)
    return hub.fetch(target, revision, label=label)


def locate_trained(run: RunConfig, workspace: Path) -> Path:
    """The target whose states are dumped and trained on: a quantised one's original.

    Raises:
        UserError, RetryableError: as `locate`.
    """
    if run.target_train is not None:
        return locate(run.target_train, workspace, revision=None, label="run.target_train")
    return locate(run.target, workspace, revision=run.target_revision)


def read_config(folder: Path, *, trust_remote_code: bool = False) -> TargetConfig:
    """The target's config.json.

    Sizes that it leaves out are those of its class in transformers.

    Raises:
        UserError: missing, not JSON, or without the sizes that every decoder has.
    """
    path = folder / "config.json"
    return parse_config(read_json(path), path, trust_remote_code=trust_remote_code)


def parse_config(whole: object, path: Path, *, trust_remote_code: bool = False) -> TargetConfig:
    """A config.json that was read from `path`.

    Raises:
        UserError: as `read_config`.
    """
    if not isinstance(whole, dict):
        raise _misshapen(path, "a model's config", whole)
    whole = {key: _plain(value) for key, value in whole.items()}
    *_, raw = parts = list(_text_parts(whole))
    _require_kinds(parts, path)
    if raw.get("text_config") is not None:  # `_text_parts` follows a dict
        raise _misshapen(path, "the text model's settings as text_config", raw["text_config"])
    config = TargetConfig(
        path.parent, raw, str(raw.get("model_type", "")), 0, 0, 0, whole, trust_remote_code
    )
    known = raw
    try:
        if missing := [name for name in _SIZES if not raw.get(name)]:
            known = config.settings
    except UserError as error:
        raise UserError(
            f"{path}: found no {', '.join(missing)} in it. {error.problem}",
            code=error.code,
            remedy=error.remedy,
            facts=error.facts,
        ) from error
    try:
        num_layers, hidden_size, vocab_size = (int(known[name]) for name in _SIZES)
        if min(num_layers, hidden_size, vocab_size) < 1:
            raise ValueError(f"{num_layers}, {hidden_size}, {vocab_size}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: expected whole numbers above 0 as {', '.join(_SIZES)}, found {error!r}.",
            code="target-config-sizes",
            remedy="Give the folder of a text model, with its config.json as it was published.",
            facts={"path": str(path)},
        ) from error
    return dataclasses.replace(
        config, num_layers=num_layers, hidden_size=hidden_size, vocab_size=vocab_size
    )


def _require_kinds(parts: Iterable[Mapping[str, Any]], path: Path) -> None:
    for part, (name, kind) in itertools.product(parts, _KINDS.items()):
        if not isinstance(part.get(name), kind | None):
            expected = "a list" if kind is list else "text"
            raise _misshapen(path, f"{expected} as {name}", part[name])


def _misshapen(path: Path, expected: str, found: object) -> UserError:
    return UserError(
        f"{path}: expected {expected}, found {type(found).__name__}.",
        code="target-config-shape",
        remedy="Restore the file as it was published.",
        facts={"path": str(path)},
    )


def _plain(value: Any) -> Any:
    """`value` with the floats that JSON has no words for, as transformers writes them.

    Worked example: {"__float__": "Infinity"} is inf.
    """
    if isinstance(value, dict):
        tagged = value.get("__float__") if len(value) == 1 else None
        if tagged in ("Infinity", "-Infinity", "NaN"):
            return float(tagged)
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _text_parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config, and in it the config of its text part, and so on."""
    yield config
    for name in _TEXT_PARTS:
        if isinstance(config.get(name), dict):
            yield from _text_parts(config[name])
            return


def weights_hash(folder: Path, paths: Iterable[Path] | None = None) -> str:
    """A hash that changes when the model does: config.json, and each file's name, size, header and edges.

    Reading 140 GB for a fingerprint would take minutes on every start; a safetensors header holds
    every name, shape and place, and the first and last MiB of the data stand for the rest. The end of a
    pickle holds the checksums of its parts.

    Args:
        paths: of the weights, if not every safetensors file of the folder.
    """
    require_file(folder / "config.json")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")) if paths is None else paths:
        require_file(path)
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as handle:
            digest.update(handle.read(1 << 20))
            handle.seek(max(0, size - (1 << 20)), os.SEEK_SET)
            digest.update(handle.read(1 << 20))
    return digest.hexdigest()
