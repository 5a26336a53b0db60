# SPDX-License-Identifier: Apache-2.0
"""Manifests against the schemas of Kubernetes' newest releases and oldest, and against each other.

Bases are plain YAML and are always checked; overlays are rendered where kubectl is at hand. Of a JobSet
the Jobs inside are checked here; JobSet itself in test_jobset.
"""

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml

from shared.errors import EXIT_OUTPUT, EXIT_STOPPED, EXIT_USER
from shared.settings import build
from stages.bench.config import BenchConfig
from stages.dump.config import DumpConfig
from stages.synth.config import SynthConfig
from stages.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[3]
K8S = ROOT / "compose" / "k8s"
# Without that of `ops adapt`, whose command gives the prompts and the head.
RECIPES = [
    path
    for path in sorted((ROOT / "compose" / "recipes").glob("*/recipe.yaml"))
    if path.parent.name != "adapt"
]
MANIFESTS = sorted(
    path
    for path in K8S.rglob("*.yaml")
    if path.name not in ("kustomization.yaml", "names.yaml")
    and "kueue" not in path.parts
    and "trainjob" not in path.parts
)
OVERLAYS = sorted(path.parent for path in (K8S / "overlays").glob("*/kustomization.yaml"))
# The three newest, and the oldest that compose/README.md names.
VERSIONS = [
    f"1.{int(kubernetes_validate.latest_version().split('.')[1]) - back}" for back in range(3)
] + ["1.34"]
CONFIGS = (SynthConfig, DumpConfig, TrainConfig, BenchConfig)
# It reads a version's schemas, megabytes of JSON, again for every object.
kubernetes_validate.utils.schema_contents = functools.cache(
    kubernetes_validate.utils.schema_contents
)


def render(overlay: Path) -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl to render overlays with")
    done = subprocess.run(["kubectl", "kustomize", overlay], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def jobs(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, spec) of every Job, alone or in a JobSet."""
    for each in objects:
        if each["kind"] == "Job":
            yield each["metadata"]["name"], each["spec"]
        elif each["kind"] == "JobSet":
            for replicated in each["spec"]["replicatedJobs"]:
                yield replicated["name"], replicated["template"]["spec"]


def validate(objects: list[dict[str, Any]], version: str) -> None:
    for each in objects:
        if each["kind"] not in ("JobSet", "TrainJob"):
            kubernetes_validate.validate(each, version, strict=True)
    for name, spec in jobs(objects):
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}
        kubernetes_validate.validate(job, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_is_what_kubernetes_takes(path: Path, version: str) -> None:
    validate(list(yaml.safe_load_all(path.read_text())), version)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_is_whole(overlay: Path) -> None:
    objects = render(overlay)
    for version in VERSIONS:
        validate(objects, version)
    assert ":latest" not in json.dumps(objects)
    recipes = {each["metadata"]["name"] for each in objects if each["kind"] == "ConfigMap"}
    storage = yaml.safe_load_all((K8S / "storage.yaml").read_text())
    claims = {each["metadata"]["name"] for each in storage}
    for name, spec in jobs(objects):
        for volume in spec["template"]["spec"]["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in recipes, name
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims, name
        check_job(name, spec)
        check_pod(spec["template"]["spec"])
        assert spec["template"]["metadata"]["labels"]["app.kubernetes.io/instance"], name
    for each in objects:
        if each["kind"] == "Pod":
            check_pod(each["spec"])
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"], each["metadata"]["name"]


def test_the_admins_page_names_what_there_is() -> None:
    """Its commands are about the h200 overlay."""
    text = (K8S / "README.md").read_text()
    objects = render(K8S / "overlays" / "h200")
    made = {each["metadata"]["name"] for each in objects}
    named = set(re.findall(r"[a-z]+-llama-3-3-70b", text))
    assert {"shell-llama-3-3-70b", "train-llama-3-3-70b"} <= named <= made
    labels = [each["metadata"]["labels"] for each in objects]
    for key, value in re.findall(r"-l (app[\w./]+)=([\w-]+)", text):
        assert any(each.get(key) == value for each in labels), value
    paths = re.findall(r"compose/[\w./-]+[\w]", text.replace("overlays/NAME", "overlays"))
    paths += [
        f"compose/k8s/{each}" for each in re.findall(r"`((?:components|overlays)/[\w-]+)`", text)
    ]
    assert paths and all((ROOT / each).exists() for each in paths), paths


def test_a_train_jobs_runtime_is_a_job_like_the_others() -> None:
    (runtime,) = yaml.safe_load_all((K8S / "trainjob" / "runtime.yaml").read_text())
    (job,) = yaml.safe_load_all((K8S / "trainjob" / "trainjob.yaml").read_text())
    nodes = runtime["spec"]["mlPolicy"]["numNodes"]
    assert job["spec"]["trainer"]["numNodes"] == nodes
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    for version in VERSIONS:
        validate(
            [{"kind": "Job", "apiVersion": "batch/v1", "metadata": {"name": "n"}, "spec": spec}],
            version,
        )
    spec |= {"completions": nodes, "parallelism": nodes}  # which the controller sets
    check_job("train", spec)
    spec["template"]["spec"]["containers"][0]["name"] = "train"
    check_pod(spec["template"]["spec"])


def test_the_demos_config_map_is_its_whole_folder() -> None:
    demo = ROOT / "stages" / "demo"
    component = yaml.safe_load((demo / "kustomization.yaml").read_text())
    named = component["configMapGenerator"][0]["files"]
    assert named == sorted(path.name for path in [*demo.glob("*.py"), demo / "topics.yaml"])


def test_small_claims_have_the_names_of_the_large_ones() -> None:
    def claims(path: Path) -> dict[str, str]:
        objects = list(yaml.safe_load_all(path.read_text()))
        return {
            each["metadata"]["name"]: each["spec"]["resources"]["requests"]["storage"]
            for each in objects
            if each["kind"] == "PersistentVolumeClaim"
        }

    small, large = claims(K8S / "overlays" / "cpu" / "storage.yaml"), claims(K8S / "storage.yaml")
    assert small.keys() == large.keys()
    assert all(size.endswith("Gi") and int(size[:-2]) <= 20 for size in small.values())


def check_job(name: str, spec: dict[str, Any]) -> None:
    """Numbers that stand twice agree, and the codes lead where they should."""
    (container,) = spec["template"]["spec"]["containers"]
    arguments = container["args"]
    if "--num_shards" in arguments:
        assert int(arguments[arguments.index("--num_shards") + 1]) == spec["completions"], name
        assert spec["completionMode"] == "Indexed"
    environment = {each["name"]: each.get("value") for each in container.get("env", ())}
    if "EYRIE_NODES" in environment:
        assert int(environment["EYRIE_NODES"]) == spec["completions"] == spec["parallelism"]
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert int(environment["EYRIE_RANKS"]) == gpus
    assert spec["podReplacementPolicy"] == "Failed"
    actions = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == container["name"]
            actions |= dict.fromkeys(codes["values"], rule["action"])
    if "backoffLimitPerIndex" in spec:  # one bad shard ends neither the others nor the Job
        assert actions == {EXIT_USER: "FailJob", EXIT_OUTPUT: "FailIndex", EXIT_STOPPED: "Ignore"}
        assert "maxFailedIndexes" not in spec
    else:
        ranks = {EXIT_USER: "FailJob", EXIT_OUTPUT: "FailJob"}
        assert actions in (ranks, ranks | {EXIT_STOPPED: "Ignore"}), name


def check_pod(pod: dict[str, Any]) -> None:
    """Pod security's restricted profile, and a root that nobody writes to."""
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["restartPolicy"] == "Never"
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True and context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    allowed = ({"persistentVolumeClaim"}, {"configMap"}, {"emptyDir"})
    assert all(set(volume) - {"name"} in allowed for volume in pod["volumes"])
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    name, _, tag = container["image"].partition(":")
    image = {"target": "train", "shell": "ops"}.get(container["name"], container["name"])
    assert name == f"eyrie.invalid/{image}" and tag
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert mounts.keys() >= {"/workspace", "/caches", "/tmp"}
    if image != container["name"]:
        return
    assert [*map(list, container["envFrom"])] == [["secretRef"], ["configMapRef"]]
    assert mounts.keys() == {"/workspace", "/models", "/etc/eyrie", "/dev/shm", "/tmp", "/caches"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_a_recipe_is_one_that_every_stage_takes(recipe: Path) -> None:
    """The same file for compose, Kubernetes and a plain command line."""
    for config in CONFIGS:
        build(config, {"recipe": str(recipe)})
    component = yaml.safe_load((recipe.parent / "kustomization.yaml").read_text())
    assert component["configMapGenerator"][0]["files"] == ["recipe.yaml"]
