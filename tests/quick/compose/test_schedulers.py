# SPDX-License-Identifier: Apache-2.0
"""Objects of Kueue and Kubeflow Trainer, held to what their own projects publish of them.

Kubernetes knows neither. Of Trainer and of JobSet the published models read an object and write it
again: what they do not know is lost on the way. Kueue publishes CRDs alone, restated in
tests/fixtures/kueue.schema.yaml.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.quick.compose.test_jobset import SOURCES as JOBSETS
from tests.quick.compose.test_jobset import put
from tests.quick.compose.test_kubernetes import K8S

SCHEMA = yaml.safe_load((Path(__file__).parents[2] / "fixtures" / "kueue.schema.yaml").read_text())
QUEUES = list(yaml.safe_load_all((K8S / "components" / "kueue" / "queues.yaml").read_text()))
TRAINER = (K8S / "trainjob" / "runtime.yaml", K8S / "trainjob" / "trainjob.yaml")
MODELS = {
    "JobSet": "JobsetV1alpha2JobSet",
    "TrainJob": "TrainerV1alpha1TrainJob",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
}


@pytest.fixture(scope="module")
def reread() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An object, read and written by the model that Kubeflow publishes for its kind."""
    models = pytest.importorskip("kubeflow_trainer_api.models")

    def read_and_write(made: dict[str, Any]) -> dict[str, Any]:
        return dict(getattr(models, MODELS[made["kind"]]).from_dict(made).to_dict())

    return read_and_write


@pytest.mark.parametrize("path", [*TRAINER, *JOBSETS], ids=lambda path: path.stem)
def test_a_published_model_knows_every_field(
    reread: Callable[[dict[str, Any]], dict[str, Any]], path: Path
) -> None:
    made = yaml.safe_load(path.read_text())
    assert reread(made) == made


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("spec/trainer/nodes", 8),
        ("spec/trainer/numNodes", "eight"),
        ("spec/runtimeRef/apigroup", "trainer.kubeflow.org"),
        ("spec/runtimeRef", None),
    ],
)
def test_a_mistake_in_a_train_job_is_found(
    reread: Callable[[dict[str, Any]], dict[str, Any]], place: str, value: object
) -> None:
    wrong = put(yaml.safe_load(TRAINER[1].read_text()), place, value)
    with pytest.raises((ValueError, AssertionError)):
        assert reread(wrong) == wrong


def names(queue: dict[str, Any]) -> Iterator[tuple[list[str], list[str]]]:
    """(covered resources, resources with a quota) of each flavor of a ClusterQueue."""
    for group in queue["spec"].get("resourceGroups", ()):
        for flavor in group["flavors"]:
            yield group["coveredResources"], [each["name"] for each in flavor["resources"]]


def check_queues(objects: list[dict[str, Any]]) -> None:
    """The schema, the CRD's own rule on quotas, and that objects name each other."""
    for each in objects:
        jsonschema.validate(each, SCHEMA)
        if each["kind"] == "ClusterQueue":
            assert all(covered == given for covered, given in names(each))
    made = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    for each in objects:
        if each["kind"] == "LocalQueue":
            assert ("ClusterQueue", each["spec"]["clusterQueue"]) in made
        if each["kind"] == "ClusterQueue":
            groups = each["spec"]["resourceGroups"]
            flavors = [flavor["name"] for group in groups for flavor in group["flavors"]]
            assert {("ResourceFlavor", name) for name in flavors} <= made.keys()


def test_queues_are_what_kueue_takes() -> None:
    check_queues(QUEUES)
    assert "eyrie" in {each["metadata"]["name"] for each in QUEUES if each["kind"] == "LocalQueue"}


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("ResourceFlavor", "apiVersion", "kueue.x-k8s.io/v1beta1"),
        ("ResourceFlavor", "spec/nodeLabel", {}),
        ("ClusterQueue", "metadata/namespace", "eyrie"),
        ("ClusterQueue", "spec/preemption/withinClusterQueue", "Always"),
        ("ClusterQueue", "spec/namespaceSelector/matchLabel", {}),
        ("ClusterQueue", "spec/resourceGroups/0/coveredResources", ["cpu"]),
        ("ClusterQueue", "spec/resourceGroups/0/flavors/0/name", "h100"),
        ("ClusterQueue", "spec/resourceGroups/0/flavors/0/resources/0/nominalQuota", "many"),
        ("LocalQueue", "metadata/namespace", None),
        ("LocalQueue", "spec/clusterQueue", "other"),
    ],
)
def test_a_mistake_in_the_queues_is_found(kind: str, place: str, value: object) -> None:
    wrong = [put(each, place, value) if each["kind"] == kind else each for each in QUEUES]
    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        check_queues(wrong)
