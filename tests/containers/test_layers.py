# SPDX-License-Identifier: Apache-2.0
"""What is in the images' layers, and must not be: weights, private files, secrets."""

import io
import json
import mmap
import os
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.containers.conftest import PLANTED_SECRET, docker

pytestmark = pytest.mark.container

WEIGHTS = re.compile(r"\.(safetensors|gguf|pt|pth|ckpt|onnx)$")
PRIVATE = re.compile(r"(^|/)(\.env|\.git|\.netrc|\.pypirc|\.ssh|\.aws|id_rsa|id_ed25519)(/|$)")


def layers(archive: tarfile.TarFile) -> Iterator[tarfile.TarFile]:
    """Each layer of a saved archive once; one that several images share is a link in all but one."""
    index = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
    seen = set()
    for name in sorted({layer for image in index for layer in image["Layers"]}):
        member = archive.getmember(name)
        if member.issym():
            linked = posixpath.join(posixpath.dirname(name), member.linkname)
            member = archive.getmember(posixpath.normpath(linked))
        if member.name not in seen:
            seen.add(member.name)
            # "r:" and no other: in a compressed layer no secret would be found as it is spelled.
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as layer:
                yield layer


def misplaced(archive: Path) -> tuple[int, list[str]]:
    """How many files the layers hold, and those of them that no image should."""
    count, found = 0, []
    with tarfile.open(archive, mode="r:") as images:
        for layer in layers(images):
            for entry in layer:
                count += 1
                # A package's own tables are no weights.
                weights = WEIGHTS.search(entry.name) and "/site-packages/" not in entry.name
                if weights or PRIVATE.search(entry.name):
                    found.append(entry.name)
    return count, found


def holds(archive: Path, secrets: Iterable[str]) -> list[str]:
    """Those of the secrets that stand anywhere in the archive: in layers, or in what describes them."""
    with (
        archive.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return [secret for secret in secrets if content.find(secret.encode()) >= 0]


def test_no_weights_and_no_private_files_in_any_layer(saved_images: Path) -> None:
    count, found = misplaced(saved_images)
    assert count > 10_000
    assert found == []


def test_no_secrets_in_any_layer(images: dict[str, str], saved_images: Path) -> None:
    history = "".join(
        docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image).stdout
        for image in images.values()
    )
    assert PLANTED_SECRET not in history
    secrets = {PLANTED_SECRET}
    secrets |= {os.environ[name] for name in os.environ if name.endswith(("_TOKEN", "_PASSWORD"))}
    found = holds(saved_images, [secret for secret in secrets if len(secret) >= 8])
    assert not found, f"{len(found)} secrets"  # a failure's report must not show them
    # That it would be found: this revision stands in a label of each image.
    revision = docker("image", "inspect", "--format", "{{json .Config.Labels}}", images["ops"])
    assert holds(saved_images, [json.loads(revision.stdout)["org.opencontainers.image.revision"]])


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def test_what_is_planted_is_found(tmp_path: Path) -> None:
    """Two images that share a layer, as the engine saves them."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as entries:
        for name in (
            "models/head.safetensors",
            "root/.netrc",
            "opt/site-packages/a/table.pt",
            "app",
        ):
            add(entries, name, PLANTED_SECRET.encode())
    path = tmp_path / "images.tar"
    with tarfile.open(path, mode="w") as archive:
        add(archive, "one/layer.tar", layer.getvalue())
        link = tarfile.TarInfo("two/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../one/layer.tar"
        archive.addfile(link)
        index = [{"Layers": ["one/layer.tar"]}, {"Layers": ["two/layer.tar"]}]
        add(archive, "manifest.json", json.dumps(index).encode())
    assert misplaced(path) == (4, ["models/head.safetensors", "root/.netrc"])
    assert holds(path, [PLANTED_SECRET, "not there"]) == [PLANTED_SECRET]
