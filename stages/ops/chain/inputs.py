# SPDX-License-Identifier: Apache-2.0
"""What the stages read from outside the run: prompts, and targets on this disk or on the hub."""

import functools
from collections.abc import Sequence
from pathlib import Path

from shared.errors import EyrieError, RetryableError, UserError
from shared.io.safetensors_files import TensorInfo
from shared.paths import RunPaths, find_input
from shared.prompts.sources import Source
from stages.ops.chain.processes import Step

Found = tuple[Path, dict[str, TensorInfo] | None]


def targets(step: Step) -> list[str]:
    """The targets that a stage loads."""
    is_served = step.settings.get("endpoints") or step.settings.get("endpoint")
    return [] if is_served else [step.target]


def prompt_sources(step: Step) -> list[Source]:
    """Where a stage takes its rows from; none where another stage's artifact is its input."""
    settings = step.settings
    listed = [*settings.get("sources", ()), settings.get("prompts"), settings.get("conversations")]
    return [
        Source(path=each)
        if isinstance(each, str)
        else Source(**{key: each[key] for key in Source.model_fields if key in each})
        for each in listed
        if each
    ]


def find(name: str, revision: str | None, paths: RunPaths) -> Found:
    """(the folder of its config.json, its tensors where only their headers were fetched).

    A hub is asked once, also where that fails.

    Raises:
        UserError: there is no such target, or it has no safetensors files.
        RetryableError: the hub cannot be reached.
    """
    folder = find_input(name, paths.workspace)
    if folder is not None:
        return folder, None
    found = _asked(name, revision, paths)
    if isinstance(found, EyrieError):
        raise found
    return found


def unanswered(left: Sequence[Step], paths: RunPaths) -> list[RetryableError]:
    """What a hub that could not be asked leaves open about the stages' targets, an error for each."""
    found = []
    users = {name: step for step in left for name in targets(step)}
    for name, step in users.items():
        try:
            find(name, step.run["target_revision"], paths)
        except RetryableError as error:
            found.append(error)
        except EyrieError:  # it is known what is wrong with it
            continue
    return found


@functools.lru_cache
def _asked(name: str, revision: str | None, paths: RunPaths) -> Found | EyrieError:
    try:
        return _ask_hub(name, revision, paths)
    except EyrieError as error:
        return error


def _ask_hub(name: str, revision: str | None, paths: RunPaths) -> Found:
    import huggingface_hub
    from huggingface_hub import constants

    from shared.io.hub import HUB_ERRORS
    from shared.target import hub

    hub.require_id(name, paths.workspace)
    try:
        kept = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
        if any(Path(kept).glob("*.safetensors")):
            return Path(kept), None
    except HUB_ERRORS:  # nothing that can be used is kept here: the hub says what is wrong
        pass
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"run.target: expected {name} in the hub's cache, found none, offline.",
            code="target-not-cached",
            remedy="Fill the cache (HF_HOME) beforehand, or unset HF_HUB_OFFLINE.",
            facts={"target": name},
        )
    path = hub.fetch_config(name, revision)
    tensors = hub.fetch_tensors(name, revision)
    if tensors is None:
        raise UserError(
            f"run.target: expected safetensors files in {name} on the hub, found none.",
            code="safetensors-missing",
            remedy="Choose a target whose weights are in safetensors files, or convert them.",
            facts={"target": name},
        )
    return path.parent, tensors
