# SPDX-License-Identifier: Apache-2.0
"""`manifest.json`, written last, alone means that an artifact is complete; how it is read.

A fingerprint covers the identity keys that the stage consumes, the fingerprints of its parents, and the
hashes of the input files; parallelism and paths of the machine change nothing.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.artifacts.checksums import require_sizes
from shared.artifacts.manifest_shape import FACTS, Manifest
from shared.config import StageConfig
from shared.errors import UserError
from shared.io.records import Shape, read_record, require_shape

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_AGAIN = "Delete it and run its stage again: what is finished is kept."


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hex SHA-256 of the canonical JSON (sorted keys, no spaces) of `identity`."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any] | None:
    """The manifest of `folder`, or None where the artifact is not complete.

    Raises:
        UserError: it is there and cannot be understood.
    """
    path = folder / name
    if not path.exists():
        return None
    manifest = read_record(path, Shape, remedy=_AGAIN)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: expected schema version {SCHEMA_VERSION}, found {version!r}.",
            code="manifest-version",
            remedy=_AGAIN,
        )
    return require_shape(manifest, Manifest, where=str(path), remedy=_AGAIN)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The keys that differ, with both values; '' if none does."""
    was, now = ({key: repr(value) for key, value in each.items()} for each in (old, new))
    keys = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
    return ", ".join(
        f"{key}: was {was.get(key, 'not there')}, now {now.get(key, 'not there')}" for key in keys
    )


def require_own_words(folder: Path, manifest: Mapping[str, Any], stage: str) -> None:
    """Refuse a manifest that is another stage's, or was changed by hand.

    Raises:
        UserError: with what it says.
    """
    if manifest["stage"] != stage:
        raise UserError(
            f"{folder}: expected an artifact of {stage}, found {manifest['stage']}.",
            code="parent-stage",
            remedy="Give each stage its own folder: another run.name, or move this one away.",
        )
    if fingerprint(manifest["identity"]) != manifest["fingerprint"]:
        raise UserError(
            f"{folder / MANIFEST}: its fingerprint is not that of its identity.",
            code="manifest-edited",
            remedy=_AGAIN,
        )


def require_parent(
    folder: Path, *, stage: str, config: StageConfig, name: str = MANIFEST
) -> dict[str, Any]:
    """The manifest of a complete parent artifact that agrees with `config`.

    Args:
        name: of the file: the manifest's, or `shared.artifacts.window.OFFER`.

    Raises:
        UserError: not complete, a file is missing or of another size, or a `run` key differs.
    """
    manifest = read_manifest(folder, name)
    if manifest is None:
        recipe = f" --recipe {shlex.quote(str(config.recipe))}" if config.recipe else ""
        workspace = shlex.quote(str(config.workspace))
        raise UserError(
            f"expected the finished artifact of stage {stage} in {folder}, found no {name}.",
            code="parent-missing",
            remedy=f"Run it first: python -m stages.{stage}{recipe} --workspace {workspace}",
            facts={"stage": stage, "folder": str(folder)},
        )
    require_own_words(folder, manifest, stage)
    require_sizes(folder, manifest)
    facts = f"{folder / name}: facts"
    require_shape(manifest["facts"], FACTS.get(stage, Shape), where=facts, remedy=_AGAIN)
    own = config.identity()
    theirs = {key: value for key, value in manifest["identity"].items() if key in own}
    shared_keys = {key: own[key] for key in theirs if key.startswith("run.")}
    if differing := differences({key: theirs[key] for key in shared_keys}, shared_keys):
        raise UserError(
            f"{folder} was made with other settings than this recipe has ({differing}).",
            code="parent-settings",
            remedy=f"Run {stage} again with --overwrite, or set the recipe back.",
            facts={"stage": stage},
        )
    return manifest
