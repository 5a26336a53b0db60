# SPDX-License-Identifier: Apache-2.0
"""What every artifact of a run must have: a manifest that is true of its files and of its parents.

In: the folder of a run. Out: answers to the questions that are the same for each artifact, and the
look at a run that all questions share. Cost: reading every file once, for its checksum.
"""

import functools
from pathlib import Path
from typing import Any

from shared.artifacts.checksums import require_sizes, require_unchanged
from shared.artifacts.manifest import MANIFEST, require_own_words
from shared.artifacts.run_state import RunState
from shared.artifacts.unfinished import IDENTITY
from shared.io import files
from shared.paths import RunPaths, find_input
from shared.runtime.wording import counted
from shared.target.model import TargetConfig, read_config
from stages.ops.look.validate.findings import Wrong

ARTIFACTS = ("synth", "dump", "train", "export", "bench")
# Which stage makes an artifact, and in which folder each parent that a manifest names lies.
MAKER = {"export": "train"}
_PARENT_FOLDERS = {
    "synth": {},
    "dump": {"synth": "synth"},
    "train": {"dump": "dump"},
    "export": {"train": "train"},
    "bench": {"train": "export"},
}
# Files that a later stage would read, or an engine load, though no manifest names them.
_READ_UNASKED = {
    "synth": ("part-*.parquet",),
    "dump": ("shard_*.pt", "samples/*.pt"),
    "export": ("*.safetensors", "*.bin"),
}


class RunView(RunState):
    """A run as its validation looks at it; everything is read once.

    Args:
        checksums: whether files are hashed; else their sizes are compared alone.
    """

    def __init__(self, paths: RunPaths, *, checksums: bool = True) -> None:
        super().__init__(paths)
        self.checksums = checksums

    @functools.cached_property
    def skipped(self) -> frozenset[str]:
        """As the run's, of artifacts: without its maker no artifact is expected, unless it is there."""
        skipped = super().skipped
        made = {name for name, maker in MAKER.items() if maker in skipped}
        return skipped | {name for name in made if self._is_untouched(name)}

    def folder(self, artifact: str) -> Path:
        return self.paths.root / artifact

    def manifest(self, artifact: str) -> dict[str, Any]:
        """The artifact's manifest.

        Raises:
            Wrong: there is none.
        """
        found = super().manifest(artifact)
        if found is None:
            raise Wrong(
                f"expected {self.folder(artifact) / MANIFEST}, found none: the artifact is not "
                f"finished. Run python -m stages.{MAKER.get(artifact, artifact)}."
            )
        return found

    @functools.cached_property
    def data_config(self) -> dict[str, Any]:
        return dict(files.read_json(self.folder("dump") / "data_config.json"))

    def target(self, artifact: str) -> TargetConfig | None:
        """The config of the target that this artifact was made with, where it lies on this disk."""
        run = self.manifest(artifact)["config"]["run"]
        original = run["target_train"] if artifact in ("dump", "train", "export") else None
        found = find_input(original or run["target"], self.paths.workspace)
        return read_config(found) if found is not None and found.is_dir() else None


def ask_manifest(run: RunView, artifact: str) -> str:
    """There is one, of this version and stage, and it says who it is."""
    manifest, folder = run.manifest(artifact), run.folder(artifact)
    require_own_words(folder, manifest, MAKER.get(artifact, artifact))
    started = files.read_json(folder / IDENTITY)
    if started != manifest["identity"]:
        raise Wrong(f"{folder / MANIFEST}: {IDENTITY} beside it is of another configuration.")
    return f"made {manifest['provenance']['finished']}, fingerprint {manifest['fingerprint'][:12]}"


def ask_settings(run: RunView, artifact: str) -> str:
    """The identity is what the kept configuration says."""
    manifest = run.manifest(artifact)
    keys = [key for key in manifest["identity"] if not key.startswith(("input.", "parent."))]
    for key in keys:
        section, *names = key.split(".", 2)
        value = manifest["config"]["run"] if section == "run" else manifest["config"]
        if names[0] not in value:  # it follows from settings, as dump.window does
            continue
        for name in names:
            value = value[name]
        if value != manifest["identity"][key]:
            raise Wrong(
                f"{run.folder(artifact) / MANIFEST}: identity says {key} = "
                f"{manifest['identity'][key]!r}, its config {value!r}."
            )
    return f"{len(keys)} settings agree"


def ask_files(run: RunView, artifact: str) -> str:
    """Every file is there, whole and unchanged, and no other is in the way."""
    folder, entries = run.folder(artifact), run.manifest(artifact)["files"]
    require_sizes(folder, run.manifest(artifact))
    if run.checksums:
        require_unchanged(folder, run.manifest(artifact), entries)
    for pattern in _READ_UNASKED.get(artifact, ()):
        for path in sorted(folder.glob(pattern)):
            if str(path.relative_to(folder)) not in entries:
                raise Wrong(f"{path} is not in the manifest, and would be read. Remove it.")
    size = sum(entry["bytes"] for entry in entries.values())
    how = "checksums agree" if run.checksums else "sizes agree"
    return f"{counted(len(entries), 'file')}, {size / 1e6:.1f} MB, {how}"


def ask_counts(run: RunView, artifact: str) -> str:
    """In = ok + skipped + failed, and each rejected row is listed."""
    manifest = run.manifest(artifact)
    counts = manifest["counts"]
    rejected = sum(counts["skipped"].values()) + sum(counts["failed"].values())
    where = run.folder(artifact)
    if counts["in"] != counts["ok"] + rejected:
        raise Wrong(
            f"{where / MANIFEST}: in = {counts['in']} is not ok + skipped + failed = "
            f"{counts['ok']} + {rejected}."
        )
    if counts["ok"] <= 0:
        raise Wrong(f"{where / MANIFEST}: no row came out.")
    lists = [name for name in manifest["files"] if name.startswith("rejects")]
    if lists:
        listed = sum(len((where / name).read_bytes().splitlines()) for name in lists)
        if listed != rejected:
            raise Wrong(
                f"{where / lists[0]}: expected {rejected} rejected rows as the counts say, found "
                f"{listed} lines."
            )
    return f"in={counts['in']} ok={counts['ok']} rejected={rejected}"


def ask_lineage(run: RunView, artifact: str) -> str:
    """Each parent is the very artifact that lies there now, made with the same run settings."""
    manifest = run.manifest(artifact)
    known = _PARENT_FOLDERS[artifact]
    for name, digest in manifest["parents"].items():
        folder = known[name]
        parent = run.manifest(folder)
        if not digest == parent["fingerprint"] == manifest["identity"][f"parent.{name}"]:
            raise Wrong(
                f"{run.folder(artifact)} was made from another {folder} ({digest[:12]}) than lies "
                f"there now ({parent['fingerprint'][:12]}). Run "
                f"{MAKER.get(artifact, artifact)} again with --overwrite."
            )
        for key, value in parent["identity"].items():
            if key.startswith("run.") and manifest["identity"].get(key, value) != value:
                raise Wrong(
                    f"{run.folder(artifact)}: {key} is {manifest['identity'][key]!r}, in its "
                    f"parent {folder} {value!r}."
                )
    if artifact in ("train", "export") and not manifest["parents"]:
        raise Wrong(f"{run.folder(artifact) / MANIFEST} names no parent.")
    made_from = ", ".join(f"{known[name]} {d[:12]}" for name, d in manifest["parents"].items())
    return f"made from {made_from}" if made_from else "no parent artifact"
