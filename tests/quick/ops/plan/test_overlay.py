# SPDX-License-Identifier: Apache-2.0
"""plan's Kubernetes overlay: rendered and held to what the shipped overlays are held to."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.errors import UserError
from shared.settings import build
from stages.ops.config import PlanConfig
from stages.ops.plan import overlay
from stages.ops.plan.run import run
from stages.ops.tables import read_data
from tests.quick.compose.test_kubernetes import (
    CONFIGS,
    VERSIONS,
    check_job,
    check_pod,
    jobs,
    render,
    validate,
)
from tests.quick.ops.plan.well_known import CONFIGS as MODELS
from tests.quick.ops.plan.well_known import plan_of

STAGES = ("synth", "dump", "train", "bench")


def settings(folder: Path, model: str, **flags: str) -> PlanConfig:
    given = {"model": str(MODELS / f"{model}.json"), "target": "org/model", "json": "true"}
    return build(PlanConfig, {**given, "overlay": str(folder), **flags})


def sized(objects: list[dict[str, Any]]) -> dict[str, tuple[int, int, int, int]]:
    """Stage -> (pods, GPUs a pod, memory GiB, /dev/shm GiB)."""
    found = {}
    for _, spec in jobs(objects):
        (container,) = spec["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        (shm,) = (v for v in spec["template"]["spec"]["volumes"] if v["name"] == "shm")
        found[container["name"]] = (
            spec.get("completions", 1),
            limits["nvidia.com/gpu"],
            int(limits["memory"].removesuffix("Gi")),
            int(shm["emptyDir"]["sizeLimit"].removesuffix("Gi")),
        )
    return found


@pytest.mark.parametrize(
    ("model", "gpu", "nodes", "gpus"),
    [
        # (pods, GPUs a pod) of synth and dump; GPUs of train and bench
        ("llama-3.1-8b-instruct", "H100", 2, ((16, 1), (16, 1), 8, 1)),
        ("mixtral-8x7b-instruct-v0.1", "H100", 1, ((4, 2), (4, 2), 8, 2)),
        ("gemma-3-27b-it", "L40S", 1, ((4, 2), (4, 2), 8, 2)),
        ("deepseek-v3", "H200", 3, ((3, 8), (3, 6), 8, 8)),  # hf spreads it over as few as hold it
    ],
)
def test_an_overlay_is_whole_and_fits(
    model: str, gpu: str, nodes: int, gpus: tuple[Any, ...], tmp_path: Path
) -> None:
    run(settings(tmp_path, model, gpu=gpu, nodes=str(nodes)))
    objects = render(tmp_path)
    storage = list(yaml.safe_load_all((tmp_path / "storage.yaml").read_text()))
    for version in VERSIONS:
        validate(objects, version)
        validate(storage, version)
    claims = {each["metadata"]["name"] for each in storage}
    (recipe,) = (each for each in objects if each["kind"] == "ConfigMap")
    for name, spec in jobs(objects):
        assert name.split("-")[0] in STAGES and len(name) < 64
        check_job(name, spec)
        check_pod(spec["template"]["spec"])
        for volume in spec["template"]["spec"]["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] == recipe["metadata"]["name"]
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
    found = sized(objects)
    assert (found["synth"][:2], found["dump"][:2], found["train"][1], found["bench"][1]) == gpus
    a_node = read_data("gpus.yaml")[gpu]["gpus_a_node"]
    for pods, each, memory, shm in found.values():
        assert pods * each <= nodes * a_node
        assert memory >= shm + 32  # what lies in /dev/shm counts as the container's memory


def test_its_recipe_is_one_that_every_stage_takes(tmp_path: Path) -> None:
    run(settings(tmp_path, "llama-3.1-8b-instruct", nodes="2"))
    (config_map,) = (each for each in render(tmp_path) if each["kind"] == "ConfigMap")
    text = config_map["data"]["recipe.yaml"]
    assert text == (tmp_path / "recipe.yaml").read_text()
    for config in CONFIGS:
        build(config, {"recipe": str(tmp_path / "recipe.yaml")})
    # A pod has GPUs for one copy of the target; more copies are more shards.
    assert yaml.safe_load(text)["dump"]["data_parallel"] == 1


def test_claims_worked_by_hand(tmp_path: Path) -> None:
    run(settings(tmp_path, "llama-3.1-8b-instruct"))
    storage = yaml.safe_load_all((tmp_path / "storage.yaml").read_text())
    asked = {
        each["metadata"]["name"]: each["spec"]["resources"]["requests"]["storage"]
        for each in storage
        if each["kind"] == "PersistentVolumeClaim"
    }
    # 50,000 x 2,048 tokens x 4 states x 4,096 x 2 bytes, 16.06 GB of weights; a quarter to spare.
    states = 50_000 * 2048 * 4 * 4096 * 2 * 1.25 / 2**30
    assert states == 3906.25
    assert asked == {"eyrie-workspace": "3910Gi", "eyrie-models": "20Gi"}


@pytest.mark.parametrize(("gpu", "is_arm"), [("GB200", True), ("B200", False)])
def test_hosts_that_are_arm_are_named(gpu: str, is_arm: bool, tmp_path: Path) -> None:
    run(settings(tmp_path, "llama-3.1-8b-instruct", gpu=gpu))
    assert ("hosts are Arm" in (tmp_path / "kustomization.yaml").read_text()) == is_arm


def test_what_no_node_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="that one node of 8 x H100 holds, found 67"):
        run(settings(tmp_path, "deepseek-v3", gpu="H100", nodes="4"))
    assert list(tmp_path.iterdir()) == []


def test_outside_of_a_checkout_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay, "_K8S", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"expected the manifests in .*nowhere, found none"):
        run(settings(tmp_path / "o", "llama-3.1-8b-instruct"))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("Qwen3.5_VL (a)", "-qwen3-5-vl-a"),
        ("x" * 90, "-" + "x" * 40),
        ("--", "-run"),
        ("a: b\u2028{c", "-a-b-c"),
    ],
)
def test_any_runs_name_makes_a_jobs_name(name: str, suffix: str, tmp_path: Path) -> None:
    plan = plan_of("llama-3.2-1b-instruct")
    for path, written in overlay.texts(plan, PlanConfig(model="m", name=name), tmp_path).items():
        path.write_text(written)
    text = (tmp_path / "kustomization.yaml").read_text()
    assert yaml.safe_load(text)["nameSuffix"] == suffix
    assert json.dumps(render(tmp_path)).count('"kind": "Job"') == len(STAGES)
