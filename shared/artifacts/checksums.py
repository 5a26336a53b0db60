# SPDX-License-Identifier: Apache-2.0
"""Are the files of a finished artifact still those that its manifest lists?

Sizes are compared wherever a parent is read: they cost one look per file. Checksums cost a pass over
the bytes, so a stage compares them for the files that it reads whole anyway.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io import files


def _changed(problem: str, folder: Path, manifest: Mapping[str, Any]) -> UserError:
    """The refusal of a changed file. Train cannot make a single file of its artifact again."""
    stage = manifest["stage"]
    remedy = f"Restore it, or delete it and run {stage} again: it makes what is missing."
    if folder.name == "train":
        remedy = f"Restore it, or run {stage} again with --overwrite."
    return UserError(problem, code="artifact-changed", remedy=remedy, facts={"stage": stage})


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except FileNotFoundError:  # removed between the two
        return None


def first_changed(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """The first file that is missing or of another size."""
    listed = manifest["files"].items()
    return next((name for name, facts in listed if _size(folder / name) != facts["bytes"]), None)


def require_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse an artifact with a file that is missing or of another size.

    Raises:
        UserError: with the first of them.
    """
    if (name := first_changed(folder, manifest)) is None:
        return
    path, expected = folder / name, manifest["files"][name]["bytes"]
    size = _size(path)
    raise _changed(
        f"{path}: expected {expected} bytes as in the manifest, found "
        f"{'no file' if size is None else size}.",
        folder,
        manifest,
    )


def require_unchanged(folder: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse these files of an artifact where their bytes are others than when it was finished.

    It reads them whole.

    Raises:
        UserError: with the first that is another one.
    """
    for name in names:
        path, expected = folder / name, manifest["files"][name]["sha256"]
        if (found := files.sha256(path)) != expected:
            raise _changed(
                f"{path}: expected the SHA-256 {expected} as in the manifest, found {found}: it is "
                "damaged.",
                folder,
                manifest,
            )
