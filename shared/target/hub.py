# SPDX-License-Identifier: Apache-2.0
"""A target on the hub: its files, or its config.json and its tensors' names and shapes without them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub

from shared.errors import EyrieError, RetryableError, UserError
from shared.io.hub import HUB_ERRORS, may_pass, status_of
from shared.io.safetensors_files import TensorInfo
from shared.paths import places

_NOT_THERE = (
    hub.RepositoryNotFoundError,
    hub.RevisionNotFoundError,
    hub.EntryNotFoundError,
    hub.HFValidationError,
)


def require_id(
    name: str, workspace: Path, *, label: str = "run.target", is_head: bool = False
) -> None:
    """Refuse what is no folder here and cannot be a hub's either.

    Raises:
        UserError: it is no organisation/name.
    """
    if name.count("/") != 1 or name.startswith((".", "/")):
        if is_head:
            raise UserError(
                f"{label}: expected a draft head's folder at {places(name, workspace)}, or a hub id "
                "(organisation/name); found neither.",
                code="head-not-found",
                remedy="Correct the name, or mount the folder.",
                facts={"head": name},
            )
        raise UserError(
            f"{label}: expected a model's folder at {places(name, workspace)}, or a hub id "
            "(organisation/name); found neither.",
            code="target-not-found",
            remedy="Correct the name, or mount the folder.",
            facts={"target": name},
        )


def fetch(
    name: str,
    revision: str | None,
    *,
    label: str = "run.target",
    patterns: list[str] | None = None,
) -> Path:
    """A model's files, all or those that a pattern matches, in the hub's cache.

    Raises:
        UserError, RetryableError: as `fetch_config`.
    """
    with _asking(name, revision, label):
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )


def fetch_config(name: str, revision: str | None) -> Path:
    """The target's config.json, in the hub's cache.

    Raises:
        UserError: the hub has no such target, revision or file, or does not let us see it; or its
            cache cannot be written.
        RetryableError: the hub cannot be reached, or its answer cannot be understood.
    """
    with _asking(name, revision, "run.target"):
        return Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision))


def fetch_tensors(name: str, revision: str | None) -> dict[str, TensorInfo] | None:
    """Every tensor by name, from the headers alone; None where the target has no safetensors files.

    Raises:
        UserError, RetryableError: as `fetch_config`.
    """
    with _asking(name, revision, "run.target"):
        try:
            metadata = huggingface_hub.get_safetensors_metadata(name, revision=revision)
        except hub.NotASafetensorsRepoError:
            return None
    return {
        tensor: {"dtype": info.dtype, "shape": list(info.shape)}
        for file in metadata.files_metadata.values()
        for tensor, info in file.tensors.items()
    }


@contextlib.contextmanager
def _asking(name: str, revision: str | None, label: str) -> Iterator[None]:
    try:
        yield
    except HUB_ERRORS as error:
        raise _refusal(error, name, revision, label) from error


def _refusal(error: Exception, name: str, revision: str | None, label: str) -> EyrieError:
    """What the hub's client raised, as one of our own errors."""
    said = next(iter(str(error).splitlines()), type(error).__name__)
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    is_kept_nowhere = isinstance(error, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled)
    if is_kept_nowhere or may_pass(error):
        return RetryableError(
            f"{label}: {name} is no folder here, and the hub could not be reached ({reason}).",
            code="hub-unreachable",
            remedy="Check the name and the network, or set HF_HOME to a filled cache.",
            facts={"target": name},
        )
    if isinstance(error, _NOT_THERE) or status_of(error) is not None:
        return UserError(
            f"{label}: {name} is no folder here, and the hub answered: {said}",
            code="target-not-on-hub",
            remedy="Correct the name or the revision, or set HF_TOKEN if the target is private or gated.",
            facts={"target": name, "revision": revision},
        )
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno):
        return UserError(
            f"{label}: {name} could not be kept in the hub's cache, {constants.HF_HUB_CACHE}: {error}.",
            code="hub-cache",
            remedy="Free some space there, make it writable, or set HF_HOME to another folder.",
            facts={"target": name, "cache": constants.HF_HUB_CACHE},
        )
    return RetryableError(
        f"{label}: {name} is no folder here, and the hub's answer could not be understood "
        f"({reason}).",
        code="hub-answer",
        remedy="Run the same command again. If it stays so, see whether HF_ENDPOINT and the proxy are right: "
        "something else than a hub may answer there.",
        facts={"target": name},
    )
