# SPDX-License-Identifier: Apache-2.0
"""What a site adds to an overlay: each component, on Jobs and on JobSets."""

import os
from pathlib import Path

import pytest
import yaml

from tests.quick.compose.test_jobset import check_jobset
from tests.quick.compose.test_kubernetes import K8S, VERSIONS, jobs, render, validate

SITE = ("network-policy", "placement", "registry")
COMPONENTS = {
    "h200": (*SITE, "kueue"),
    "cpu": (*SITE, "kueue"),
    "h200-multinode": (*SITE, "kueue", "rdma"),
    "h200-chain": SITE,
}


@pytest.mark.parametrize("base", COMPONENTS)
def test_components_fit_an_overlay(base: str, tmp_path: Path) -> None:
    """All of them at once, in an overlay of the site's own."""
    here = Path(os.path.relpath(K8S, tmp_path))
    overlay = {
        "resources": [str(here / "overlays" / base)],
        "components": [str(here / "components" / each) for each in COMPONENTS[base]],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    objects = render(tmp_path)
    for version in VERSIONS:
        validate(objects, version)
    assert "NetworkPolicy" in {each["kind"] for each in objects}
    for name, spec in jobs(objects):
        pod = spec["template"]["spec"]
        assert pod["imagePullSecrets"] == [{"name": "eyrie-pull"}], name
        assert pod["containers"][0]["image"].startswith("registry.example.com/eyrie/")
        if not name.startswith("target"):  # it needs no GPU
            assert pod["tolerations"] and pod["nodeSelector"] and pod["priorityClassName"], name
    for each in objects:
        if each["kind"] in ("Job", "JobSet") and "kueue" in COMPONENTS[base]:
            assert each["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "eyrie"
            assert each["spec"]["suspend"] is True
        if each["kind"] == "JobSet":
            check_jobset(each)
    if "rdma" in COMPONENTS[base]:
        ((_, ranks),) = jobs(objects)
        (container,) = ranks["template"]["spec"]["containers"]
        assert "NCCL_IB_HCA" in {each["name"] for each in container["env"]}
