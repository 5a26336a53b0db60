# SPDX-License-Identifier: Apache-2.0
"""Compose files against the specification's schema, and as compose itself resolves them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
TOOLS = Path(sys.executable).parent
BASE = ROOT / "compose.yaml"
OVERLAYS = sorted((ROOT / "compose").glob("*.yaml"))
STAGES = ("synth", "dump", "train", "bench")

needs_compose = pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0,
    reason="no docker compose to resolve the files with",
)
needs_bake = pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "buildx", "version"], capture_output=True).returncode != 0,
    reason="no docker buildx to resolve the file with",
)


def run(*command: str | Path, **variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EYRIE_")}
    done = subprocess.run(
        command, cwd=ROOT, env={**kept, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def services(*overlays: str, profile: str = "*", **variables: str) -> dict[str, Any]:
    """What compose makes of the files: service -> its settings."""
    files = [word for name in overlays for word in ("--file", f"compose/{name}.yaml")]
    profiles = ["--profile", profile] if profile else []
    command = ["docker", "compose", "--file", "compose.yaml", *files, *profiles]
    resolved = json.loads(run(*command, "config", "--format", "json", **variables))
    return dict(resolved.get("services") or {})


def test_files_follow_the_specification(tmp_path: Path) -> None:
    """`!reset` is compose's own tag, which the schema's reader does not know."""
    copies = []
    for path in (BASE, *OVERLAYS):
        copy = tmp_path / path.name
        text = path.read_text().replace(", build: !reset null", "")
        copy.write_text(re.sub(r"!reset (null|\[\])", r"\1", text))
        copies.append(copy)
    run(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", *copies)


def test_yaml_and_shell_are_clean() -> None:
    files = [BASE, *(ROOT / "compose").rglob("*.yaml")]
    run(TOOLS / "yamllint", "--strict", *files)
    scripts = [
        ROOT / ".ci" / "run",
        *(ROOT / "docker").glob("*.sh"),
        *(ROOT / "compose" / "slurm").iterdir(),
    ]
    run(TOOLS / "shellcheck", *scripts)


@needs_compose
def test_a_bare_up_starts_nothing() -> None:
    assert services(profile="") == {}
    assert services("cpu", profile="") == {}


@needs_compose
@pytest.mark.parametrize("overlays", [(), ("cpu",), ("cpu", "pipeline", "demo")])
def test_no_service_may_do_what_it_need_not(overlays: tuple[str, ...]) -> None:
    for name, service in services(*overlays).items():
        assert service["user"] == "2000:0", name
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["init"] is True
        assert service["restart"] == "no"
        if name in STAGES:
            assert service["stop_grace_period"] == "5m0s"
            assert int(service["shm_size"]) >= 1 << 31


@needs_compose
def test_gpus_are_reserved_by_variable_and_not_on_the_processor() -> None:
    def reserved(service: dict[str, Any]) -> list[int]:
        resources = service.get("deploy", {}).get("resources", {})
        return [each["count"] for each in resources.get("reservations", {}).get("devices", ())]

    with_gpus = services(EYRIE_GPUS="2")
    assert {name: reserved(each) for name, each in with_gpus.items() if name != "ops"} == {
        stage: [2] for stage in STAGES
    }
    assert not any(reserved(each) for each in [with_gpus["ops"], *services("cpu").values()])


@needs_compose
def test_the_chain_is_a_chain() -> None:
    chain = services("cpu", "pipeline", "demo", profile="")
    awaited = {name: set(chain[name].get("depends_on", ())) for name in ("target", *STAGES)}
    assert awaited == {
        "target": set(),
        "synth": {"target"},
        "dump": {"synth"},
        "train": {"dump"},
        "bench": {"train"},
    }
    for service in chain.values():
        for condition in service.get("depends_on", {}).values():
            assert condition["condition"] == "service_completed_successfully"


@needs_compose
@pytest.mark.parametrize("overlays", [(), ("cpu",)])
def test_a_swap_changes_tag_argument_and_name_together(overlays: tuple[str, ...]) -> None:
    before = services(*overlays)
    after = services(*overlays, DUMP_VLLM_VERSION="0.30.0")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"dump"}
    arguments = after["dump"]["build"]["args"]
    assert "vllm-0.30.0" in after["dump"]["image"] == arguments["IMAGE"]
    assert arguments["VLLM_VERSION"] == "0.30.0"


@needs_compose
@pytest.mark.parametrize("overlays", [(), ("cpu",)])
def test_a_servers_key_reaches_those_that_ask_servers(overlays: tuple[str, ...]) -> None:
    found = services(*overlays, EYRIE_ENDPOINT_KEY="ek-1")
    keys = {name: each["environment"].get("EYRIE_ENDPOINT_KEY") for name, each in found.items()}
    assert {name for name, key in keys.items() if key == "ek-1"} == {"synth", "bench"}


@needs_compose
def test_variables_are_explained() -> None:
    used = set()
    for path in (BASE, *OVERLAYS):
        text = path.read_text()
        used |= set(re.findall(r"\$\{([A-Z_]+)", text))
        used |= set(re.findall(r"^ +([A-Z][A-Z_]+):$", text, re.MULTILINE))
    explained = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert used == explained - {"COMPOSE_FILE"}


@needs_compose
@pytest.mark.parametrize("overlays", [(), ("cpu",), ("cpu", "pipeline", "demo")])
def test_our_images_are_built_here_and_their_names_are_no_strangers(
    overlays: tuple[str, ...],
) -> None:
    """`.invalid` never resolves (RFC 2606): whoever registers a name on a hub gets no token of ours."""
    for name, service in services(*overlays).items():
        assert service["pull_policy"] == ("never" if "demo" in overlays else "build"), name
        assert service["image"].startswith("eyrie.invalid/"), name
    pulled = services(*overlays, "pull", EYRIE_REGISTRY="registry.example.com/us")
    for name in (*STAGES, "ops"):
        assert pulled[name]["pull_policy"] == "missing"
        assert pulled[name]["image"].startswith(f"registry.example.com/us/{name}:")


@needs_compose
def test_an_example_copied_to_env_changes_nothing() -> None:
    """So the defaults that it shows are the real ones."""
    assert services() == services(**dict(lines_of_example()))


def lines_of_example() -> list[tuple[str, str]]:
    text = (ROOT / ".env.example").read_text()
    return re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE)


@needs_compose
def test_two_runs_are_two_projects_and_share_their_volumes() -> None:
    resolved = [
        json.loads(run("docker", "compose", "--profile", "*", "config", "--format", "json", **each))
        for each in ({}, {"EYRIE_RUN": "smoke"})
    ]
    assert [each["name"] for each in resolved] == ["eyrie-demo", "eyrie-smoke"]
    assert resolved[0]["volumes"] == resolved[1]["volumes"]
    recipes = [each["services"]["synth"]["volumes"][-1]["source"] for each in resolved]
    assert [Path(each).parent.name for each in recipes] == ["demo", "smoke"]


@needs_compose
@needs_bake
def test_each_engine_stage_may_have_its_own_base() -> None:
    digest = "mirror.example.com/vllm:v0.31.0@sha256:" + "0" * 64
    swap = {"DUMP_BASE_IMAGE": digest, "DUMP_VLLM_VERSION": "0.31.0", "ENGINE_BASE_IMAGE": "other"}
    bases = {
        name: each["build"]["args"].get("BASE_IMAGE") for name, each in services(**swap).items()
    }
    assert (bases["synth"], bases["dump"]) == ("other", digest)


def bake(**variables: str) -> dict[str, Any]:
    """What bake would build: stage -> its target."""
    words = ["docker", "buildx", "bake", "--file", "docker/docker-bake.hcl", "--print"]
    return dict(json.loads(run(*words, **variables))["target"])


@needs_bake
def test_a_release_labels_the_digests_of_its_bases_and_names_its_platforms() -> None:
    bases = {"DUMP_BASE_IMAGE": "mirror.example.com/vllm:v0.32.0@sha256:aa"}
    bases |= {"CPU_BASE_IMAGE": "debian@sha256:bb"}
    label = "org.opencontainers.image.base.digest"
    gpu = bake(FLAVOUR="gpu", **bases)
    digests = {name: each["labels"][label] for name, each in gpu.items() if "labels" in each}
    assert digests == {"dump": "sha256:aa", "ops": "sha256:bb"}
    assert not any("platforms" in each for each in gpu.values())
    for each in bake(FLAVOUR="cpu", PLATFORMS="linux/amd64,linux/arm64", **bases).values():
        assert each["labels"][label] == "sha256:bb"
        assert each["platforms"] == ["linux/amd64", "linux/arm64"]


@needs_compose
@needs_bake
@pytest.mark.parametrize("flavour", ["gpu", "cpu"])
def test_bake_and_compose_name_and_build_alike(flavour: str) -> None:
    swap = {"BENCH_VLLM_VERSION": "0.31.0", "VLLM_VERSION": "0.30.0", "EYRIE_REGISTRY": "a/b"}
    swap |= {"DUMP_BASE_IMAGE": "mirror.example.com/vllm", "EYRIE_SOURCE": "https://example.com"}
    overlays = ("cpu",) if flavour == "cpu" else ()
    composed = services(*overlays, **swap)
    baked = bake(FLAVOUR=flavour, **swap)
    assert baked.keys() == composed.keys()
    defaults = {"FLAVOUR": "gpu", "CPU_BASE_IMAGE": "debian:bookworm-slim"}
    for name, target in baked.items():
        build = composed[name]["build"]
        assert target["tags"] == [composed[name]["image"]]
        assert target["dockerfile"] == build["dockerfile"]
        arguments = {**defaults, **target["args"]}
        assert arguments == {**defaults, **build["args"]}
