# SPDX-License-Identifier: Apache-2.0
"""The artifact of a stage: a folder whose `manifest.json`, written last, alone means "complete".

The same configuration continues a half-made folder (`shared/artifacts/unfinished.py`), another one is refused
with the keys named, and nothing is deleted in silence; several processes may share the work
(`shared/artifacts/sharding.py`). A fingerprint covers the identity keys that the stage consumes, the
fingerprints of its parents, and the hashes of the input files; parallelism and paths of the machine
change nothing.
"""

import contextlib
import hashlib
import json
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.artifacts import provenance
from shared.artifacts.borrowed import refuse_borrowed
from shared.artifacts.checksums import first_changed, require_sizes
from shared.artifacts.manifest_shape import FACTS, Manifest
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
from shared.io.records import Shape, read_record, require_shape
from shared.runtime.process import lock

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
# What a process of several leaves behind is swept once no writer can still be at it.
_SHARED_SWEEP_S = 3600.0
_AGAIN = "Delete it and run its stage again: what is finished is kept."

logger = logging.getLogger(__name__)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hex SHA-256 of the canonical JSON (sorted keys, no spaces) of `identity`."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any] | None:
    """The manifest of `folder`, or None where the artifact is not complete.

    Raises:
        UserError: it is there and cannot be understood.
    """
    path = folder / name
    if not path.exists():
        return None
    manifest = read_record(path, Shape, remedy=_AGAIN)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: expected schema version {SCHEMA_VERSION}, found {version!r}.",
            code="manifest-version",
            remedy=_AGAIN,
        )
    return require_shape(manifest, Manifest, where=str(path), remedy=_AGAIN)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    was, now = ({key: repr(value) for key, value in each.items()} for each in (old, new))
    keys = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
    return ", ".join(
        f"{key}: was {was.get(key, 'not there')}, now {now.get(key, 'not there')}" for key in keys
    )


def require_own_words(folder: Path, manifest: Mapping[str, Any], stage: str) -> None:
    """Refuse a manifest that is another stage's, or was changed by hand.

    Raises:
        UserError: with what it says.
    """
    if manifest["stage"] != stage:
        raise UserError(
            f"{folder}: expected an artifact of {stage}, found {manifest['stage']}.",
            code="parent-stage",
            remedy="Give each stage its own folder: another run.name, or move this one away.",
        )
    if fingerprint(manifest["identity"]) != manifest["fingerprint"]:
        raise UserError(
            f"{folder / MANIFEST}: its fingerprint is not that of its identity.",
            code="manifest-edited",
            remedy=_AGAIN,
        )


def require_parent(
    folder: Path, *, stage: str, config: StageConfig, name: str = MANIFEST
) -> dict[str, Any]:
    """The manifest of a complete parent artifact that agrees with `config`.

    Args:
        name: of the file: the manifest's, or `shared.artifacts.window.OFFER`.

    Raises:
        UserError: not complete, a file is missing or of another size, or a `run` key differs.
    """
    manifest = read_manifest(folder, name)
    if manifest is None:
        recipe = f" --recipe {shlex.quote(str(config.recipe))}" if config.recipe else ""
        workspace = shlex.quote(str(config.workspace))
        raise UserError(
            f"expected the finished artifact of stage {stage} in {folder}, found no {name}.",
            code="parent-missing",
            remedy=f"Run it first: python -m stages.{stage}{recipe} --workspace {workspace}",
            facts={"stage": stage, "folder": str(folder)},
        )
    require_own_words(folder, manifest, stage)
    require_sizes(folder, manifest)
    facts = f"{folder / name}: facts"
    require_shape(manifest["facts"], FACTS.get(stage, Shape), where=facts, remedy=_AGAIN)
    own = config.identity()
    theirs = {key: value for key, value in manifest["identity"].items() if key in own}
    shared_keys = {key: own[key] for key in theirs if key.startswith("run.")}
    if differences := _differences({key: theirs[key] for key in shared_keys}, shared_keys):
        raise UserError(
            f"{folder} was made with other settings than this recipe has ({differences}).",
            code="parent-settings",
            remedy=f"Run {stage} again with --overwrite, or set the recipe back.",
            facts={"stage": stage},
        )
    return manifest


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
        self.identity: dict[str, Any] = {
            **config.identity(),
            **{f"input.{name}": digest for name, digest in (inputs or {}).items()},
            **{f"parent.{name}": digest for name, digest in self.parents.items()},
        }
        self.fingerprint = fingerprint(self.identity)

    def is_done(self) -> bool:
        """Whether the finished artifact of this very configuration is there already, and whole.

        Raises:
            UserError: there is one of another configuration, or one that cannot be mended, and
                --overwrite was not given.
        """
        if self.config.overwrite:
            refuse_borrowed(self.folder)
        try:
            manifest = read_manifest(self.folder)
        except UserError:
            if self.config.overwrite and not self._is_shared:  # nobody asks for what is in it
                return False
            raise
        found = manifest["identity"] if manifest else started_identity(self.folder)
        if found is None or not (manifest or holds_work(self.folder)):
            return False
        if fingerprint(found) == self.fingerprint:
            # Of several processes none may undo what another has just made.
            if manifest and (self._is_shared or not self.config.overwrite):
                return self._is_whole(manifest)
            return False
        if not self.config.overwrite:
            raise UserError(
                f"{self.folder} holds {'a finished' if manifest else 'an unfinished'} artifact of "
                f"another configuration ({_differences(found, self.identity)}).",
                code="artifact-settings",
                remedy="Give --overwrite to replace it, or another run.name to keep both.",
            )
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
        is_own = found is not None and fingerprint(found) == self.fingerprint
        return is_own and not (self.folder / MANIFEST).exists()

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
                if found is not None and fingerprint(found) != self.fingerprint:
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
