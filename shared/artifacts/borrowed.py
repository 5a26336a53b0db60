# SPDX-License-Identifier: Apache-2.0
"""A run that trains on another run's dump: links in its folder lead to the other's artifacts.

    <workspace>/B/dump  -> ../A/dump
    <workspace>/B/synth -> ../A/synth

So everything that reads run B (train, bench's lineage, status, validate) finds them where it looks.
Nobody works in a borrowed folder: run A alone may change it. A link to anywhere else, such as a
larger disk, is the run's own folder.
"""

from pathlib import Path

from shared.errors import UserError
from shared.io import files
from shared.paths import RunPaths

_STAGES = ("synth", "dump")


def borrowed_from(folder: Path) -> str | None:
    """Name of the run of this workspace whose artifact `folder` is a link to, or None."""
    if not folder.is_symlink():
        return None
    parts = folder.readlink().parts
    is_run = len(parts) == 3 and parts[0] == ".." and parts[2] == folder.name
    return parts[1] if is_run and parts[1] != ".." else None


def refuse_borrowed(folder: Path) -> None:
    """Refuse to change another run's artifact.

    Raises:
        UserError: `folder` is borrowed.
    """
    if (owner := borrowed_from(folder)) is not None:
        raise UserError(
            f"{folder} is a link to the artifact of run {owner}, which only that run may change.",
            code="artifact-borrowed",
            remedy=f"Run the stage with --name {owner}, or remove the link to make an own one.",
            facts={"folder": str(folder), "owner": owner},
        )


def require_lender(paths: RunPaths, owner: str) -> None:
    """Refuse to borrow from run `owner`; nothing is linked yet.

    Raises:
        UserError: `owner` is no other run with a dump, or this run has a dump or answers of its own.
    """
    source = RunPaths(paths.workspace, owner).stage("dump")
    if Path(owner).name != owner or owner == paths.run_name or not source.is_dir():
        raise UserError(
            f"train.dump_of: expected another run with a dump, found none at {source}.",
            code="dump-of-nothing",
            remedy="Give the name of a run in this workspace whose dump is finished.",
            facts={"dump_of": owner},
        )
    for stage in _STAGES:
        own, link = paths.stage(stage), f"../{owner}/{stage}"
        found = str(own.readlink()) if own.is_symlink() else None
        # Another rank may make the link meanwhile: a link that was not there is that one.
        if found not in (None, link) or (found is None and own.exists() and not own.is_symlink()):
            raise UserError(
                f"train.dump_of is {owner}, but this run has a folder of its own at {own}.",
                code="dump-of-beside-own",
                remedy="Leave out dump_of, or give this run another run.name.",
                facts={"dump_of": owner, "folder": str(own)},
            )


def borrow_dump(paths: RunPaths, owner: str) -> None:
    """Link this run's dump, and the answers that it was made from, to those of run `owner`.

    Raises:
        UserError: as `require_lender`.
    """
    require_lender(paths, owner)
    for stage in _STAGES:
        own = paths.stage(stage)
        if not own.is_symlink() and RunPaths(paths.workspace, owner).stage(stage).is_dir():
            own.parent.mkdir(parents=True, exist_ok=True)
            files.write_link(own, f"../{owner}/{stage}")
