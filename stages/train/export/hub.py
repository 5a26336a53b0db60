# SPDX-License-Identifier: Apache-2.0
"""Upload of an exported folder to the model hub, with the hub client's own token (HF_TOKEN)."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from shared.errors import RetryableError, UserError


def push(folder: Path, repository: str) -> None:
    """Upload the folder; a repository that does not exist is created as a private one.

    Raises:
        UserError: the name is invalid, or the token does not permit the upload.
        RetryableError: the hub cannot be reached.
    """
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        raise UserError(
            f"--push_to {repository}: {error}",
            code="push-repository",
            remedy="Give the repository as organisation/name.",
            facts={"repository": repository},
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403):
            raise UserError(
                f"--push_to {repository}: the hub answered with status {status}.",
                code="push-denied",
                remedy="Set HF_TOKEN to a token with write access to it.",
                facts={"repository": repository, "status": status},
            ) from error
        raise _unreachable(folder, repository, error) from error
    except OSError as error:
        raise _unreachable(folder, repository, error) from error


def _unreachable(folder: Path, repository: str, error: Exception) -> RetryableError:
    return RetryableError(
        f"--push_to {repository}: the hub could not be reached: {error}",
        code="push-failed",
        remedy=f"{folder} is complete; run the same command again.",
        facts={"repository": repository},
    )
