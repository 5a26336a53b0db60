# SPDX-License-Identifier: Apache-2.0
"""Real images, built once for all tests here, and compose projects that run them.

Without a Docker engine these tests skip; with CI=1 they fail instead.
"""

import dataclasses
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU = ("compose.yaml", "compose/cpu.yaml")
CHAIN = (*CPU, "compose/pipeline.yaml")
STREAM = (*CHAIN, "compose/stream.yaml")
STAGES = ("synth", "dump", "train", "bench")
IMAGES = (*STAGES, "ops")
# Whoever builds has secrets; none of them may end in a layer.
PLANTED_SECRET = "hf_" + secrets.token_hex(16)


def docker(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """A docker command that must succeed."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{arguments}: {done.stderr[-2000:]}"
    return done


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


def wait_for(label: str, found: Callable[[], object], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, f"no {label} after {timeout_s} s"
        time.sleep(0.1)


@dataclasses.dataclass(frozen=True)
class Project:
    """A compose project with a workspace of its own."""

    name: str
    workspace: str
    recipe: Path = ROOT / "compose" / "recipes" / "smoke" / "recipe.yaml"
    variables: dict[str, str] = dataclasses.field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "COMPOSE_PROJECT_NAME": self.name,
            "EYRIE_REVISION": git("describe", "--always", "--dirty", "--abbrev=40"),
            "EYRIE_SOURCE": git("remote", "get-url", "origin") or "unknown",
            "EYRIE_VOLUMES": self.name,
            "EYRIE_RECIPE": str(self.recipe),
            "EYRIE_WORKSPACE": self.workspace,
            **self.variables,
        }

    def command(self, files: tuple[str, ...], *arguments: str) -> list[str]:
        named = [word for file in files for word in ("--file", file)]
        return ["docker", "compose", *named, *arguments]

    def compose(
        self, *arguments: str, files: tuple[str, ...] = CPU, timeout: float = 900
    ) -> subprocess.CompletedProcess[str]:
        """Run a compose command to its end, whatever that is."""
        return subprocess.run(
            self.command(files, *arguments),
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def start(self, *arguments: str, files: tuple[str, ...] = CPU) -> "subprocess.Popen[bytes]":
        """Start a compose command and leave it to itself."""
        return subprocess.Popen(
            self.command(files, *arguments),
            cwd=ROOT,
            env=self.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def container(self, service: str) -> str:
        """The id of a service's container, running or ended."""
        found = self.compose("ps", "--all", "--quiet", service, files=CHAIN)
        assert found.returncode == 0, found.stderr
        return found.stdout.strip()

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine knows of a service's container."""
        (facts,) = json.loads(docker("inspect", self.container(service)).stdout)
        return dict(facts)

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "0", files=CHAIN)


def has_docker() -> bool:
    """Whether an engine and compose answer."""
    if shutil.which("docker") is None:
        return False
    asked = (["docker", "info"], ["docker", "compose", "version"])
    return all(subprocess.run(each, capture_output=True).returncode == 0 for each in asked)


@pytest.fixture(scope="session")
def engine() -> None:
    """A Docker engine that answers."""
    if has_docker():
        return
    if os.environ.get("CI"):
        pytest.fail("no Docker engine answers, and in CI the container tests must run")
    pytest.skip("no Docker engine answers")


@pytest.fixture(scope="session")
def images(engine: None) -> dict[str, str]:
    """Stage -> tag of its image, CPU flavour, built as a user would build them."""
    built = subprocess.run(
        ["make", "images", "FLAVOUR=cpu"],
        cwd=ROOT,
        env={**os.environ, "HF_TOKEN": PLANTED_SECRET, "EYRIE_WORKSPACE": "workspace"},
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert built.returncode == 0, built.stderr[-4000:]
    config = Project("eyrie-names", "workspace").compose(
        "--profile", "*", "config", "--format", "json"
    )
    services = json.loads(config.stdout)["services"]
    return {name: services[name]["image"] for name in IMAGES}


@pytest.fixture(scope="session")
def saved_images(
    images: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """All images in one archive, as the engine would hand them on; each shared layer once."""
    archive = tmp_path_factory.mktemp("saved") / "images.tar"
    docker("save", "--output", str(archive), *images.values())
    yield archive
    archive.unlink()  # gigabytes, and pytest keeps its folders


@pytest.fixture(scope="module")
def project(images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project on a folder of this machine that belongs to the containers' user."""
    workspace = tmp_path_factory.mktemp("workspace")
    uid = os.getuid() or 2000
    workspace.chmod(0o755)
    os.chown(workspace, uid, -1)
    name = f"eyrie-test-{secrets.token_hex(4)}"
    project = Project(name, str(workspace), variables={"EYRIE_UID": str(uid)})
    yield project
    project.down()
