# SPDX-License-Identifier: Apache-2.0
"""Upload of an exported folder to the model hub, with the hub client's own token (HF_TOKEN)."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from shared.errors import EyrieError, RetryableError, UserError
from shared.io.hub import HUB_ERRORS, may_pass, status_of


def push(folder: Path, repository: str) -> None:
    """Upload the folder; a repository that does not exist is created as a private one.

    Raises:
        UserError: there is no such organisation, or the token does not permit the upload.
        RetryableError: the hub cannot be reached, or its answer cannot be understood.
    """
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except HUB_ERRORS as error:
        raise _refusal(error, folder, repository) from error


def _refusal(error: Exception, folder: Path, repository: str) -> EyrieError:
    """What the hub's client raised, as one of our own errors."""
    facts = {"repository": repository, "status": status_of(error)}
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"--push_to {repository}: {error}",
            code="push-repository",
            remedy="Give the repository as organisation/name.",
            facts=facts,
        )
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if status_of(error) is not None and not may_pass(error):
        return UserError(
            f"--push_to {repository}: the hub refused it ({reason}).",
            code="push-denied",
            remedy="Set HF_TOKEN to a token with write access to it.",
            facts=facts,
        )
    return RetryableError(
        f"--push_to {repository}: the hub did not take it ({reason}).",
        code="push-failed",
        remedy=f"{folder} is complete; run the same command again.",
        facts=facts,
    )
