# SPDX-License-Identifier: Apache-2.0
"""Are the files of a finished artifact still those that its manifest lists?

Sizes cost a look at each name and are asked for wherever a parent is read; checksums cost a pass over
the bytes, and are asked for by who reads all of them anyway.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io import files


def _way_out(folder: Path, manifest: Mapping[str, Any]) -> str:
    """What helps against a damaged file. Weights and their history cannot be made one by one."""
    stage = manifest["stage"]
    if folder.name == "train":
        return f"Restore it, or run {stage} again with --overwrite."
    return f"Restore it, or delete it and run {stage} again: what is missing is made again."


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


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
    raise UserError(
        f"{path}: expected {expected} bytes as the manifest says, found "
        f"{'no file' if size is None else size}. {_way_out(folder, manifest)}"
    )


def require_unchanged(folder: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse these files of an artifact where their bytes are others than when it was finished.

    Costs a pass over them, so ask it of what is read whole anyway.

    Raises:
        UserError: with the first that is another one.
    """
    for name in names:
        path, expected = folder / name, manifest["files"][name]["sha256"]
        if (found := files.sha256(path)) != expected:
            raise UserError(
                f"{path}: expected the SHA-256 {expected} as the manifest says, found {found}: it is "
                f"damaged. {_way_out(folder, manifest)}"
            )
