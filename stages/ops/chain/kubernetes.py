# SPDX-License-Identifier: Apache-2.0
"""The chain on a Kubernetes cluster: each stage is a Job, or a JobSet, of a kustomize overlay.

In: the overlay, whose ConfigMap must hold the recipe, and a kubectl that reaches the cluster. Out: the
stage's own exit code, reported within seconds of the Job's failure, and the end of the failed pod's
log. A signal ends the watching; the Job goes on.

A complete Job of the same recipe is not run again. A failed one, or one of another recipe, is deleted
first, since a Job's template cannot be changed.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import EXIT_BUG, EXIT_DONE, EXIT_OUTPUT, EXIT_USER, RetryableError, UserError
from shared.runtime.process import stop_if_requested
from stages.ops.chain.kubectl import Kubectl, Object, Overlay

_POLL_S = 5.0
_PATIENCE_S = 120.0  # an API server may be away for as long while it is upgraded
_LOG_LINES = "30"
_JOB_OF_A_JOBSET = "jobset.sigs.k8s.io/jobset-name"
# No attempt will succeed until a person changes something.
_CANNOT_START = ("InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError")
_MAY_START = ("ErrImagePull", "ImagePullBackOff", "Unschedulable")

logger = logging.getLogger(__name__)


def run(recipe: Path, folder: Path, stages: Sequence[str]) -> int:
    """Run the stages one after another; returns the exit code of the first that failed, or 0.

    Raises:
        UserError: overlay and recipe do not belong together, or the cluster refuses them.
        RetryableError: the cluster does not answer for two minutes.
        Stopped: a signal arrived; the Job of the current stage goes on.
    """
    overlay = Overlay.render(folder)
    overlay.check_recipe(recipe)
    kubectl = Kubectl(overlay.namespace)
    if overlay.has_target:
        stages = ("target", *stages)
    for stage in stages:
        started_s = time.monotonic()
        code = _Stage(stage, overlay.job(stage), kubectl).run(overlay.beside(stage))
        if code != EXIT_DONE:
            logger.error("%s ended with exit code %d", stage, code)
            return code
        logger.info("%s: done after %.0f s", stage, time.monotonic() - started_s)
    return EXIT_DONE


class _Stage:
    """One stage's Job, from its start to its end."""

    def __init__(self, stage: str, job: Object, kubectl: Kubectl) -> None:
        self._stage, self._job, self._kubectl = stage, job, kubectl
        self._name = str(job["metadata"]["name"])
        self._kind = str(job["kind"]).lower()
        self._reported: set[str] = set()

    def run(self, beside: list[Object]) -> int:
        self._start(beside)
        answered_s = time.monotonic()
        while True:
            stop_if_requested(f"{self._kind} {self._name} goes on in the cluster")
            try:
                job = self._kubectl.get(self._kind, self._name)
                pods = self._pods()
                answered_s = time.monotonic()
            except RetryableError:
                if time.monotonic() - answered_s > _PATIENCE_S:
                    raise
                time.sleep(_POLL_S)
                continue
            if (code := self._outcome(job, pods)) is not None:
                return code
            self._report(job, pods)
            time.sleep(_POLL_S)

    def _start(self, beside: list[Object]) -> None:
        """Create the Job, unless one of the same recipe is complete or running."""
        documents = "---\n".join(json.dumps(each) + "\n" for each in beside)
        if beside:
            self._kubectl.run("apply", "--filename", "-", given=documents)
        there = self._kubectl.get(self._kind, self._name)
        if there and (_failed(there) or _config_maps(there) != _config_maps(self._job)):
            logger.info("%s: deleting %s %s of an earlier try", self._stage, self._kind, self._name)
            self._kubectl.run(
                "delete", self._kind, self._name, "--cascade=foreground", "--wait=false"
            )
            while self._kubectl.get(self._kind, self._name):
                stop_if_requested(f"{self._kind} {self._name} is being deleted")
                time.sleep(1)
        elif there:
            return
        self._kubectl.run("apply", "--filename", "-", given=json.dumps(self._job))
        logger.info("%s: %s %s created", self._stage, self._kind, self._name)

    def _pods(self) -> list[Object]:
        label = "job-name" if self._kind == "job" else _JOB_OF_A_JOBSET
        return list(
            self._kubectl.get("pods", "--selector", f"{label}={self._name}").get("items", ())
        )

    def _outcome(self, job: Object, pods: Sequence[Object]) -> int | None:
        """The stage's exit code, or None while it runs."""
        if not job:
            raise UserError(
                f"{self._kind} {self._name} was deleted while it was watched.",
                code="job-deleted",
                remedy="Run the same command again to create it.",
            )
        if _condition(job, "Complete", "Completed"):
            return EXIT_DONE
        if not (failed := _failed(job)):
            return None
        logger.error("%s failed: %s: %s", self._stage, failed.get("reason"), failed.get("message"))
        ended = [(pod, code) for pod in pods if (code := _exit_code(pod))]
        if not ended:  # the pods are gone, and the Job's own message may still tell
            told = re.search(r"exit code (\d+)", str(failed.get("message")))
            return int(told[1]) if told else EXIT_BUG
        # Of several pods, the one whose code the Job's policy acts upon comes first.
        refused = (EXIT_USER, EXIT_OUTPUT)
        pod, code = min(ended, key=lambda pair: (pair[1] not in refused, _name(pair[0])))
        self._show_log(pod)
        return code

    def _show_log(self, pod: Object) -> None:
        name = _name(pod)
        try:
            text = self._kubectl.run("logs", name, "--tail", _LOG_LINES)
        except (UserError, RetryableError) as error:
            text = f"its log cannot be read: {error}"
        sys.stderr.write(f"--- the end of {name}'s log\n{text.rstrip()}\n---\n")

    def _report(self, job: Object, pods: Sequence[Object]) -> None:
        """Log what has changed: counts of pods, failed attempts, pods that cannot start."""
        for pod in pods:
            name = _name(pod)
            if code := _exit_code(pod):
                self._once(f"{name} ended with exit code {code}", logging.WARNING)
            reason, message = _waiting(pod)
            if reason in _CANNOT_START:
                raise UserError(
                    f"{name} cannot start: {reason}: {message}",
                    code="pod-cannot-start",
                    remedy="Correct the image's name or the missing object, then run this again.",
                    facts={"pod": name, "reason": reason},
                )
            if reason in _MAY_START:
                self._once(f"{name} waits: {reason}: {message}", logging.WARNING)
        if job["spec"].get("suspend"):
            self._once(f"{self._kind} {self._name} is suspended: it waits for its queue")
        status = job.get("status", {})
        if self._kind == "job":
            counts = (status.get(key) or 0 for key in ("ready", "succeeded", "failed"))
            total = job["spec"].get("completions") or 1
            running, done, failed = counts
            self._once(f"pods: {running} running, {done} done, {failed} failed, of {total}")

    def _once(self, line: str, level: int = logging.INFO) -> None:
        if line not in self._reported:
            self._reported.add(line)
            logger.log(level, "%s: %s", self._stage, line)


def _condition(job: Object, *kinds: str) -> Mapping[str, Any]:
    """The first condition of one of these kinds that holds; {} if none does."""
    conditions = job.get("status", {}).get("conditions") or ()
    for kind in kinds:
        for each in conditions:
            if each["type"] == kind and each["status"] == "True":
                return dict(each)
    return {}


def _failed(job: Object) -> Mapping[str, Any]:
    # A Job has FailureTarget while its last pods still end: minutes before Failed.
    return _condition(job, "Failed", "FailureTarget")


def _name(each: Object) -> str:
    return str(each["metadata"]["name"])


def _config_maps(job: Object) -> list[str]:
    """Names of the ConfigMaps that its pods mount: kustomize hashes their content into the name."""
    spec = job["spec"]
    replicated = spec.get("replicatedJobs") or [{"template": job}]
    pods = [each["template"]["spec"]["template"]["spec"] for each in replicated]
    volumes = [volume for pod in pods for volume in pod.get("volumes", ())]
    return sorted(each["configMap"]["name"] for each in volumes if "configMap" in each)


def _statuses(pod: Object) -> list[Object]:
    return list(pod.get("status", {}).get("containerStatuses") or ())


def _exit_code(pod: Object) -> int:
    """What the pod's container ended with; 0 while it runs."""
    ended = (each.get("state", {}).get("terminated") or {} for each in _statuses(pod))
    return next((int(each["exitCode"]) for each in ended if each.get("exitCode")), 0)


def _waiting(pod: Object) -> tuple[str, str]:
    """(reason, message) of what a pod waits for: its image, or a node; two empty texts if nothing."""
    reasons = [each.get("state", {}).get("waiting") or {} for each in _statuses(pod)]
    conditions = pod.get("status", {}).get("conditions") or ()
    reasons += [each for each in conditions if each.get("type") == "PodScheduled"]
    for each in reasons:
        if each.get("reason"):
            return str(each["reason"]), str(each.get("message", ""))
    return "", ""
