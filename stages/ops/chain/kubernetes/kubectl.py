# SPDX-License-Identifier: Apache-2.0
"""kubectl, and what a kustomize overlay renders to."""

import dataclasses
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from shared.errors import RetryableError, UserError

COMPONENT = "app.kubernetes.io/component"

Object = dict[str, Any]

# What kubectl prints when the server is away, starting or too busy.
_AWAY = (
    "Unable to connect",
    "EOF",
    "InternalError",
    "ServiceUnavailable",
    "TooManyRequests",
    "connection",
    "deadline exceeded",
    "no route to host",
    "timed out",
    "timeout",
    "unable to handle the request",
)


@dataclasses.dataclass(frozen=True)
class Kubectl:
    """kubectl in one namespace."""

    namespace: str = ""

    def run(self, *arguments: str, given: str | None = None) -> str:
        """What a kubectl command prints.

        Raises:
            RetryableError: the cluster does not answer.
            UserError: there is no kubectl, or the cluster refuses the command.
        """
        namespace = ["--namespace", self.namespace] if self.namespace else []
        command = ["kubectl", *namespace, *arguments]
        try:
            done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
        except OSError as error:
            raise UserError(
                f"--by kubernetes: could not start kubectl: {error.strerror}.",
                code="kubectl-missing",
                remedy="Install kubectl and put it on PATH.",
            ) from error
        except subprocess.TimeoutExpired as error:
            raise _unreachable(f"no answer to kubectl {arguments[0]} in 60 s") from error
        if done.returncode == 0:
            return done.stdout
        complaint = done.stderr.strip() or f"exit code {done.returncode}"
        if "x509" not in complaint and any(word in complaint for word in _AWAY):
            raise _unreachable(complaint)
        raise UserError(
            f"kubectl {' '.join(arguments)}: {complaint}",
            code="kubectl-refused",
            remedy="Correct the overlay, log in to the cluster again, or ask its admin for the right "
            "to do this.",
            facts={"namespace": self.namespace},
        )

    def get(self, *arguments: str) -> Object:
        """One object, or a list of them; {} if there is none."""
        text = self.run("get", *arguments, "--ignore-not-found", "--output", "json")
        return dict(json.loads(text)) if text.strip() else {}

    def apply(self, objects: Sequence[Object]) -> None:
        """Create objects, or change them to this."""
        whole = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.run("apply", "--filename", "-", given=json.dumps(whole))


def _unreachable(complaint: str) -> RetryableError:
    return RetryableError(
        f"the Kubernetes API server does not answer: {complaint}.",
        code="cluster-unreachable",
        remedy="Check `kubectl cluster-info`, then run the same command again; Jobs go on meanwhile.",
    )


@dataclasses.dataclass(frozen=True)
class Overlay:
    """What an overlay renders to."""

    folder: Path
    objects: tuple[Object, ...]

    @classmethod
    def render(cls, folder: Path) -> "Overlay":
        """Render it with kubectl.

        Raises:
            UserError: it is no overlay.
        """
        text = Kubectl().run("kustomize", str(folder))
        return cls(folder, tuple(each for each in yaml.safe_load_all(text) if each))

    @property
    def namespace(self) -> str:
        return str(self.objects[0]["metadata"].get("namespace", ""))

    @property
    def has_target(self) -> bool:
        return any(_component(each) == "target" for each in self.objects if each["kind"] == "Job")

    def beside(self, stage: str) -> list[Object]:
        """The objects that a stage needs: recipe, policies, files; no Job and no Pod."""
        kept = (each for each in self.objects if each["kind"] not in ("Job", "JobSet", "Pod"))
        return [each for each in kept if _component(each) in ("recipe", stage)]

    def job(self, stage: str) -> Object:
        """The Job or JobSet of a stage.

        Raises:
            UserError: the overlay has none, or more than one.
        """
        kinds = ("Job", "JobSet")
        found = [o for o in self.objects if o["kind"] in kinds and _component(o) == stage]
        if len(found) != 1:
            raise UserError(
                f"{self.folder}: expected one Job or JobSet with the label {COMPONENT}={stage}, "
                f"found {len(found)}.",
                code="overlay-without-stage",
                remedy=f"Choose an overlay that runs {stage}, or leave it out with --skip {stage}.",
                facts={"overlay": str(self.folder), "stage": stage},
            )
        return found[0]

    def check_recipe(self, recipe: Path) -> None:
        """Hold the overlay's ConfigMap to the recipe of the command line.

        Raises:
            UserError: they differ.
        """
        texts = [each["data"].get("recipe.yaml") for each in self.beside("") if "data" in each]
        if recipe.read_text(encoding="utf-8") not in texts:
            raise UserError(
                f"{self.folder}: expected a ConfigMap with the content of {recipe}, found another.",
                code="overlay-recipe",
                remedy="Give the recipe that the overlay's component names, or change the component.",
                facts={"overlay": str(self.folder), "recipe": str(recipe)},
            )


def _component(each: Object) -> str:
    return str(each["metadata"].get("labels", {}).get(COMPONENT, ""))
