# SPDX-License-Identifier: Apache-2.0
"""Artifacts that were made before a setting existed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.artifacts.manifest import MANIFEST, fingerprint, read_manifest
from shared.errors import UserError
from shared.io import files
from tests.quick.shared.artifacts.test_manifest import finished, unfinished


def age(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Let the artifact be one of an older version: `change` takes settings out of its identity."""
    path = folder / name
    record = files.read_json(path)
    identity = record["identity"] if name == MANIFEST else record
    change(identity)
    if name == MANIFEST:
        record["fingerprint"] = fingerprint(identity)
    files.write_json(path, record)


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ({}, ""),
        ({"temperature": "0.5"}, r"\(synth.temperature: was 0.0, now 0.5\)"),
        ({"top_p": "0.9"}, r"\(synth.top_p: was 1.0, now 0.9\)"),  # the younger one
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_a_setting_younger_than_the_artifact_counts_as_its_default(
    tmp_path: Path, flags: dict[str, str], refused: str, complete: bool
) -> None:
    done = finished(tmp_path)
    age(done.folder, MANIFEST, lambda identity: identity.pop("synth.top_p"))
    age(done.folder, "identity.json", lambda identity: identity.pop("synth.top_p"))
    older = read_manifest(done.folder)
    assert older is not None
    if not complete:
        (done.folder / MANIFEST).unlink()
    artifact = unfinished(tmp_path, **flags)
    if refused:
        with pytest.raises(UserError, match=refused):
            artifact.is_done()
        return
    assert artifact.is_done() == complete
    # What was made of it names it by this fingerprint; a rest that is made now must not change it.
    assert artifact.fingerprint == older["fingerprint"]
    with artifact.work():
        assert (done.folder / "part.txt").read_text() == "rows"


def test_so_does_a_setting_inside_a_setting(tmp_path: Path) -> None:
    flags = {"prompts": "null", "sources": "[{path: a.jsonl}]"}
    done = finished(tmp_path, **flags)
    age(done.folder, MANIFEST, lambda identity: identity["synth.sources"][0].pop("weight"))
    assert unfinished(tmp_path, **flags).is_done()
    other = "[{path: a.jsonl, weight: 2}]"
    with pytest.raises(UserError, match=r"synth\.sources: was"):
        unfinished(tmp_path, **{**flags, "sources": other}).is_done()


def test_a_shared_artifact_of_an_older_version_is_continued(tmp_path: Path) -> None:
    flags = {"shard_index": "0", "num_shards": "2"}
    first = unfinished(tmp_path, **flags)
    with first.work():
        files.write_text(first.folder / "part.txt", "rows")
    age(first.folder, "identity.json", lambda identity: identity.pop("synth.top_p"))
    with unfinished(tmp_path, **flags).work():
        assert (first.folder / "part.txt").read_text() == "rows"


def test_a_setting_that_is_no_more_is_named(tmp_path: Path) -> None:
    folder = finished(tmp_path).folder
    age(folder, MANIFEST, lambda identity: identity.update({"synth.best_of": 2}))
    with pytest.raises(UserError, match=r"\(synth.best_of: was 2, now not there\)"):
        unfinished(tmp_path).is_done()
