# SPDX-License-Identifier: Apache-2.0
"""JobSets against their CRD's schema and the rules of the controller's webhook.

JobSet is no part of Kubernetes: kubernetes-validate does not know it, and a cluster drops in silence
what its CRD does not name. The Jobs inside are held to Kubernetes' own schemas by test_kubernetes.
"""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.quick.compose.test_kubernetes import K8S, OVERLAYS, render

SCHEMA = yaml.safe_load((Path(__file__).parents[2] / "fixtures" / "jobset.schema.yaml").read_text())
# Names of what the controller makes become host names: DNS labels.
LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
SOURCES = sorted(
    path for path in K8S.rglob("*.yaml") if "kind: JobSet\nmetadata" in path.read_text()
)


def check_jobset(jobset: dict[str, Any]) -> None:
    """The CRD's schema, and what the webhook refuses although the schema takes it."""
    jsonschema.validate(jobset, SCHEMA)
    earlier: list[str] = []
    for replicated in jobset["spec"]["replicatedJobs"]:
        assert replicated["name"] not in earlier, f"two jobs named {replicated['name']}"
        for dependency in replicated.get("dependsOn", ()):
            assert dependency["name"] in earlier, f"{replicated['name']} waits for none before it"
        earlier.append(replicated["name"])
        job = replicated["template"]["spec"]
        last_job = (
            f"{jobset['metadata']['name']}-{replicated['name']}-{replicated.get('replicas', 1) - 1}"
        )
        last_pod = f"{last_job}-{job.get('completions', 1) - 1}-abcde"
        assert LABEL.fullmatch(last_pod), f"{last_pod} is no DNS label"
    rules = jobset["spec"].get("failurePolicy", {}).get("rules", [])
    assert len({rule["name"] for rule in rules}) == len(rules), "two rules of one name"
    for rule in rules:
        assert set(rule.get("targetReplicatedJobs", ())) <= set(earlier), rule["name"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.parent.name)
def test_a_jobset_is_what_its_crd_takes(path: Path) -> None:
    check_jobset(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_a_rendered_jobset_is_what_its_crd_takes(overlay: Path) -> None:
    """With the suffix of the run: names grow."""
    for each in render(overlay):
        if each["kind"] == "JobSet":
            check_jobset(each)


def put(jobset: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy of the JobSet with this at `path`; None takes away what is there."""
    wrong = copy.deepcopy(jobset)
    *folders, last = [int(word) if word.isdecimal() else word for word in path.split("/")]
    place: Any = wrong
    for folder in folders:
        place = place[folder]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return wrong


JOB = "spec/replicatedJobs/1/template/spec"
MISTAKES: list[tuple[str, object]] = [
    ("apiVersion", "jobset.x-k8s.io/v1"),
    ("spec/replicatedJob", []),
    ("spec/replicatedJobs", []),
    ("spec/ttlSecondsAfterFinished", -1),
    ("spec/ttlSecondsAfterFinished", "7d"),
    ("spec/network", {"enableDnsHostnames": True}),
    ("spec/successPolicy", {"operator": "Most"}),
    ("spec/startupPolicy", {"startupPolicyOrder": "InOrder"}),
    ("spec/failurePolicy/maxRestarts", "3"),
    ("spec/failurePolicy/restartStrategy", "Replace"),
    ("spec/failurePolicy/rules/0/action", "FailJob"),
    ("spec/failurePolicy/rules/0/name", "no spaces"),
    ("spec/failurePolicy/rules/0/onJobFailureReasons", ["PodFailed"]),
    ("spec/failurePolicy/rules/0/targetReplicatedJobs", ["bunch"]),
    ("spec/replicatedJobs/0/dependsOn", [{"name": "dump", "status": "Complete"}]),
    ("spec/replicatedJobs/1/name", "synth"),
    ("spec/replicatedJobs/1/name", "x" * 60),
    ("spec/replicatedJobs/1/name", "dump_2"),
    ("spec/replicatedJobs/1/template", None),
    ("spec/replicatedJobs/1/dependsOn/0/status", "Completed"),
    ("spec/replicatedJobs/1/dependsOn/0/status", None),
    ("spec/replicatedJobs/1/dependsOn/0/name", "bench"),
    (f"{JOB}/backoffLimits", 3),
    (f"{JOB}/podFailurePolicy/rules/0/onPodConditions/0/status", None),
    (f"{JOB}/podFailurePolicy/rules/1/onExitCodes/operator", None),
]


@pytest.mark.parametrize(("path", "value"), MISTAKES, ids=lambda part: str(part)[-40:])
def test_a_planted_mistake_is_found(path: str, value: object) -> None:
    chain = yaml.safe_load((K8S / "chain" / "chain.yaml").read_text())
    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        check_jobset(put(chain, path, value))
