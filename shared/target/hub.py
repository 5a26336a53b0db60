# SPDX-License-Identifier: Apache-2.0
"""What the hub says of a target without its weights: config.json, and the tensors' names and shapes."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub

from shared.errors import RetryableError, UserError
from shared.io.safetensors_files import TensorInfo


def fetch_config(name: str, revision: str | None) -> Path:
    """The target's config.json, in the hub's cache.

    Raises:
        UserError: the hub has no such target, revision or file, or does not let us see it.
        RetryableError: the hub cannot be reached.
    """
    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision))
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise _unreachable(name, error) from error
    except (
        hub.RepositoryNotFoundError,
        hub.RevisionNotFoundError,
        hub.EntryNotFoundError,
        hub.HFValidationError,
    ) as error:
        raise UserError(
            f"{name} is no folder, and the hub answered: {str(error).splitlines()[0]}",
            code="target-not-on-hub",
            remedy="Correct the name or the revision, or set HF_TOKEN if the target is private or gated.",
            facts={"target": name, "revision": revision},
        ) from error
    except (hub.HfHubHTTPError, OSError) as error:
        raise _unreachable(name, error) from error


def fetch_tensors(name: str, revision: str | None) -> dict[str, TensorInfo] | None:
    """Every tensor by name, from the headers alone; None where the target has no safetensors files.

    Raises:
        RetryableError: the hub cannot be reached.
    """
    try:
        metadata = huggingface_hub.get_safetensors_metadata(name, revision=revision)
    except (hub.NotASafetensorsRepoError, hub.SafetensorsParsingError, hub.EntryNotFoundError):
        return None
    except (hub.HfHubHTTPError, OSError) as error:
        raise _unreachable(name, error) from error
    return {
        tensor: {"dtype": info.dtype, "shape": list(info.shape)}
        for file in metadata.files_metadata.values()
        for tensor, info in file.tensors.items()
    }


def _unreachable(name: str, error: Exception) -> RetryableError:
    return RetryableError(
        f"{name} is no folder here, and the hub could not be reached ({type(error).__name__}).",
        code="hub-unreachable",
        remedy="Check the network, or set HF_HOME to a filled cache.",
        facts={"target": name},
    )
