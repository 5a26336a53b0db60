# SPDX-License-Identifier: Apache-2.0
"""A stage's folder on its way to completeness.

The same configuration continues a half-made folder (`shared/artifacts/unfinished.py`), another one is
refused with the keys named, and nothing is deleted in silence; several processes may share the work
(`shared/artifacts/sharding.py`).
"""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.artifacts import provenance
from shared.artifacts.borrowed import refuse_borrowed
from shared.artifacts.checksums import first_changed, require_sizes
from shared.artifacts.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    differences,
    fingerprint,
    read_manifest,
)
from shared.artifacts.run_recipe import record_recipe
from shared.artifacts.sharding import hold_share
from shared.artifacts.unfinished import (
    IDENTITY,
    LOCK,
    clear_unfinished,
    holds_work,
    started_identity,
)
from shared.config import StageConfig
from shared.errors import UserError
from shared.io import files
from shared.runtime.process import lock

# What a process of several leaves behind is swept once no writer can still be at it.
_SHARED_SWEEP_S = 3600.0

logger = logging.getLogger(__name__)


def _found(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The manifest in `folder`, and the identity of what is finished or begun there; None without.

    Raises:
        UserError: they cannot be understood.
    """
    manifest = read_manifest(folder)
    if manifest:
        return manifest, manifest["identity"]
    found = started_identity(folder)
    return None, found if found is not None and holds_work(folder) else None


def _of_other_settings(folder: Path, manifest: object, differing: str) -> UserError:
    return UserError(
        f"{folder} holds {'a finished' if manifest else 'an unfinished'} artifact of another "
        f"configuration ({differing}).",
        code="artifact-settings",
        remedy="Give --overwrite to replace it, or another run.name to keep both.",
    )


def refusal(config: StageConfig) -> str:
    """What the stage will say against the artifact in its folder, as far as settings tell; or ''."""
    if config.overwrite:
        return ""
    folder, own = config.paths.stage(config.section), config.identity()
    try:
        manifest, found = _found(folder)
    except UserError as error:
        return str(error)
    if found is None:
        return ""
    theirs = config.with_defaults(found)
    for key in list(theirs):
        # Inputs and parents are read only later; so is what the stage makes of `auto`, a number.
        is_chosen = own.get(key) == "auto" and not isinstance(theirs[key], str)
        if is_chosen or not key.startswith(("run.", f"{config.section}.")):
            del theirs[key]
            own.pop(key, None)
    differing = differences(theirs, own)
    return str(_of_other_settings(folder, manifest, differing)) if differing else ""


class Artifact:
    """One stage's folder on its way to completeness.

    Args:
        mends: whether a file that is missing from a finished one is made again, as it was.
    """

    def __init__(
        self,
        folder: Path,
        config: StageConfig,
        *,
        parents: Mapping[str, Mapping[str, Any]] | None = None,
        inputs: Mapping[str, str] | None = None,
        mends: bool = True,
    ) -> None:
        self.folder = folder
        self.config = config
        self._mends = mends
        self.parents = {name: parent["fingerprint"] for name, parent in (parents or {}).items()}
        self._wanted: dict[str, Any] = {
            **config.identity(),
            **{f"input.{name}": digest for name, digest in (inputs or {}).items()},
            **{f"parent.{name}": digest for name, digest in self.parents.items()},
        }
        self.identity, self.fingerprint = self._wanted, fingerprint(self._wanted)

    def is_done(self) -> bool:
        """Whether the finished artifact of this very configuration is there already, and whole.

        Raises:
            UserError: there is one of another configuration, or one that cannot be mended, and
                --overwrite was not given.
        """
        if self.config.overwrite:
            refuse_borrowed(self.folder)
        try:
            manifest, found = _found(self.folder)
        except UserError:
            if self.config.overwrite and not self._is_shared:  # nobody asks for what is in it
                return False
            raise
        if found is None:
            return False
        if self._take_up(found):
            # Of several processes none may undo what another has just made.
            if manifest and (self._is_shared or not self.config.overwrite):
                return self._is_whole(manifest)
            return False
        if not self.config.overwrite:
            whole = self.config.with_defaults(found)
            raise _of_other_settings(self.folder, manifest, differences(whole, self._wanted))
        return False

    def _is_whole(self, manifest: Mapping[str, Any]) -> bool:
        if not self._mends:
            require_sizes(self.folder, manifest)
        if (changed := first_changed(self.folder, manifest)) is not None:
            logger.warning("%s is not as it was: what is missing is made again", changed)
            return False
        logger.info("already done: %s", self.folder / MANIFEST)
        return True

    def _is_begun(self) -> bool:
        """Whether this configuration's own unfinished work lies here: also --overwrite continues it."""
        try:
            found = started_identity(self.folder)
        except UserError:
            return False
        is_own = found is not None and self._take_up(found)
        return is_own and not (self.folder / MANIFEST).exists()

    def _take_up(self, found: Mapping[str, Any]) -> bool:
        """Whether `found` is this configuration's identity, and if so, keep it.

        One without a setting that did not exist yet stays as it is: later stages name its fingerprint.
        """
        whole = self.config.with_defaults(found)
        is_own = fingerprint(whole) == fingerprint(self._wanted)
        if is_own:
            self.identity, self.fingerprint = dict(found), fingerprint(found)
        return is_own

    @property
    def _is_shared(self) -> bool:
        return self.config.share.count > 1

    @contextlib.contextmanager
    def work(self) -> Iterator[bool]:
        """Hold the folder, or this process's share of it (see `shared/artifacts/sharding.py`).

        What a killed run of the same configuration left stays for resuming.

        Yields:
            False where another process has finished the artifact since it was asked about.

        Raises:
            RetryableError: another process works on it.
        """
        refuse_borrowed(self.folder)
        if self._is_shared:
            with self._work_on_share():
                yield self._is_needed()
            return
        with lock(self.folder / LOCK):
            if self.config.overwrite and not self._is_begun():
                self._clear()
            if not self._is_needed():
                yield False
                return
            files.sweep_temporaries(self.folder)
            files.write_json(self.folder / IDENTITY, self.identity)
            record_recipe(self.config)
            yield True

    def _is_needed(self) -> bool:
        """Whether anything is left to do; a manifest of what is not whole goes, before it is mended."""
        if not (self.folder / MANIFEST).exists():
            return True
        if self.is_done():
            return False
        files.unlink(self.folder, MANIFEST)
        return True

    @contextlib.contextmanager
    def _work_on_share(self) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            with lock(self.folder / f"{LOCK}-setup", wait=True):
                found = started_identity(self.folder)
                if found is not None and not self._take_up(found):
                    with lock(self.folder / LOCK):  # nobody is at work on the other configuration
                        self._clear()
                        found = None
                if found is None:
                    files.write_json(self.folder / IDENTITY, self.identity)
                held.enter_context(hold_share(self.folder, self.config.share))
                record_recipe(self.config)
            files.sweep_temporaries(self.folder, idle_s=_SHARED_SWEEP_S)
            yield

    def _clear(self) -> None:
        json.dumps(self.identity, allow_nan=False)  # what cannot be recorded replaces nothing
        # The manifest goes first: a half-deleted artifact must not look complete.
        (self.folder / MANIFEST).unlink(missing_ok=True)
        clear_unfinished(self.folder)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[bool]:
        """True in the one process that is to call `finish`; another one, later, gets False."""
        if not self._is_shared:
            yield True
            return
        with lock(self.folder / f"{LOCK}-finish", wait=True):
            yield not (self.folder / MANIFEST).exists()

    def finish(
        self,
        names: Sequence[str],
        *,
        counts: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
        checksums: Mapping[str, str] | None = None,
        engine: str = "",
        name: str = MANIFEST,
    ) -> None:
        """Write the manifest: from here on the artifact is complete.

        Args:
            names: every file that belongs to the artifact, relative to the folder.
            checksums: SHA-256 of files that were hashed when written; the rest is hashed here.
            name: of the file to write; another than the manifest's completes nothing.
        """
        known = checksums or {}
        entries = {}
        for each in sorted(names):
            path = self.folder / each
            digest = known.get(each) or files.sha256(path)
            entries[each] = {"bytes": path.stat().st_size, "sha256": digest}
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "stage": self.config.section,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "parents": self.parents,
            "counts": dict(counts),
            "facts": dict(facts or {}),
            "files": entries,
            "config": self.config.model_dump(mode="json"),
            "provenance": provenance.collect(argv=sys.argv, engine=engine),
        }
        if not (self.folder / IDENTITY).exists():  # somebody removed it meanwhile
            files.write_json(self.folder / IDENTITY, self.identity)
        files.write_json(self.folder / name, manifest)
        logger.info("done: %s", self.folder / name)
