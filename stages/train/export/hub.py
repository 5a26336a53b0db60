# SPDX-License-Identifier: Apache-2.0
"""An exported folder as a repository of the model hub. The token is the hub client's own (HF_TOKEN)."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from shared.errors import RetryableError, UserError


def push(folder: Path, repository: str) -> None:
    """Create the repository, private, where there is none, and upload the folder.

    Raises:
        UserError: the name is none, or the token does not allow it.
        RetryableError: the hub cannot be reached.
    """
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        raise UserError(f"--push_to {repository}: the hub says: {error}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403):
            raise UserError(
                f"--push_to {repository}: the hub refuses ({status}). Set HF_TOKEN to a token that "
                "may write there."
            ) from error
        raise RetryableError(f"--push_to {repository}: {error}") from error
    except OSError as error:
        raise RetryableError(
            f"--push_to {repository}: could not reach the hub: {error}. {folder} is complete."
        ) from error
