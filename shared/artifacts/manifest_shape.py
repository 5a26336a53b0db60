# SPDX-License-Identifier: Apache-2.0
"""What stands in a `manifest.json`: the keys that are read of it, and what each must hold."""

from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from shared.io.records import Shape

_LONGEST_NAME = 255


def _inside(name: str) -> str:
    """A file's name that does not lead out of the artifact's folder."""
    path = PurePosixPath(name)
    too_long = any(len(part) > _LONGEST_NAME for part in path.parts)
    if path.is_absolute() or ".." in path.parts or not name.isprintable() or too_long:
        raise ValueError("expected a file's name inside the artifact")
    return name


Count = Annotated[int, Field(ge=0)]


class Entry(Shape):
    """A file of an artifact."""

    bytes: Count
    sha256: str


FileName = Annotated[str, AfterValidator(_inside)]


class Counts(Shape):
    """The rows of a stage, as `shared/runtime/status.py` accounts for them."""

    ok: Count
    skipped: dict[str, Count]
    failed: dict[str, Count]
    rows_in: Count = Field(alias="in")


class _Provenance(Shape):
    finished: str
    revision: str
    accelerator: str
    argv: list[str]
    packages: dict[str, str]


class Manifest(Shape):
    """The whole of it."""

    stage: str
    fingerprint: str
    identity: dict[str, Any]
    parents: dict[str, str]
    counts: Counts
    facts: dict[str, Any]
    files: dict[FileName, Entry]
    config: dict[str, Any]
    provenance: _Provenance


class _SynthFacts(Shape):
    target_hash: str
    vocabulary_hash: str
    greedy: bool


class _DumpFacts(Shape):
    target_hash: str
    aux_layers: list[int]
    greedy: bool


# What the next stage reads of its parent.
FACTS: dict[str, type[Shape]] = {"synth": _SynthFacts, "dump": _DumpFacts}
