# SPDX-License-Identifier: Apache-2.0
"""The chain on a Kubernetes cluster: each stage is a Job, or a JobSet, of a kustomize overlay.

In: the overlay, whose ConfigMap must hold the recipe, and a kubectl that reaches the cluster. Out: the
stage's own exit code, reported within seconds of the Job's failure, and the end of the failed pod's
log. A signal ends the watching; the Job goes on.

A complete Job of the same recipe is not run again. One that has failed, or has ended with another recipe,
is deleted first, since a Job's template cannot be changed. One that runs with another recipe is somebody
else's: it is left alone, and the run refused before its first stage.
"""

import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shared.errors import EXIT_DONE, RetryableError, UserError
from shared.runtime.process import stop_if_requested
from stages.ops.chain.kubernetes import objects
from stages.ops.chain.kubernetes.kubectl import Kubectl, Object, Overlay

_POLL_S = 5.0
_PATIENCE_S = 120.0  # an API server may be away for as long while it is upgraded
_LOG_LINES = "30"
_JOB_OF_A_JOBSET = "jobset.sigs.k8s.io/jobset-name"
# No attempt will succeed until a person changes something.
_CANNOT_START = ("InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError")
_MAY_START = ("ErrImagePull", "ImagePullBackOff", "Unschedulable")

logger = logging.getLogger(__name__)


def run(recipe: Path, overlay: Overlay, stages: Sequence[str]) -> int:
    """Run the stages one after another; returns the exit code of the first that failed, or 0.

    Raises:
        UserError: overlay and recipe do not belong together, the cluster refuses them or lacks a claim, or
            a Job of another recipe runs under one of the names.
        RetryableError: the cluster does not answer for two minutes.
        Stopped: a signal arrived; the Job of the current stage goes on.
    """
    overlay.check_recipe(recipe)
    kubectl = Kubectl(overlay.namespace)
    if overlay.has_target:
        stages = ("target", *stages)
    chain = {stage: _Stage(stage, overlay.job(stage), kubectl) for stage in stages}
    _check_claims(overlay, kubectl)
    for each in chain.values():  # before the first of them begins
        each.check()
    for stage, each in chain.items():
        started_s = time.monotonic()
        code = each.run(overlay.beside(stage))
        if code != EXIT_DONE:
            logger.error("%s ended with exit code %d", stage, code)
            return code
        logger.info("%s: done after %.0f s", stage, time.monotonic() - started_s)
    return EXIT_DONE


def _check_claims(overlay: Overlay, kubectl: Kubectl) -> None:
    """Look for the claims that pods would wait for in vain, as far as this user may look.

    Raises:
        UserError: one is missing.
    """
    jobs = [each for each in overlay.objects if each["kind"] in ("Job", "JobSet")]
    for claim in sorted({claim for job in jobs for claim in objects.claims(job)}):
        try:
            found = kubectl.get("persistentvolumeclaim", claim)
        except UserError as error:
            logger.info("claims cannot be looked at: %s", error)
            return
        if not found:
            place = kubectl.namespace or "default"
            raise UserError(
                f"expected the claim {claim} in namespace {place}, found none.",
                code="claim-missing",
                remedy="Create namespace and claims once: kubectl apply -f compose/k8s/storage.yaml",
                facts={"claim": claim, "namespace": place},
            )


class _Stage:
    """One stage's Job, from its start to its end."""

    def __init__(self, stage: str, job: Object, kubectl: Kubectl) -> None:
        self._stage, self._job, self._kubectl = stage, job, kubectl
        self._name = str(job["metadata"]["name"])
        self._kind = str(job["kind"]).lower()
        self._reported: set[str] = set()
        self._reads_events = True

    def check(self) -> None:
        """Leave a Job alone that is not this run's.

        Raises:
            UserError: a Job of this name runs with another recipe.
        """
        there = self._kubectl.get(self._kind, self._name)
        if there and not objects.has_ended(there) and self._has_other_recipe(there):
            raise UserError(
                f"{self._kind} {self._name} runs with another recipe "
                f"({', '.join(objects.config_maps(there))}) than the overlay's "
                f"({', '.join(objects.config_maps(self._job))}).",
                code="job-of-another-recipe",
                remedy="Wait for its end, delete it, or give this run a nameSuffix of its own.",
                facts={"job": self._name},
            )

    def _has_other_recipe(self, there: Object) -> bool:
        return objects.config_maps(there) != objects.config_maps(self._job)

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
        if beside:
            self._kubectl.apply(beside)
        there = self._kubectl.get(self._kind, self._name)
        if there and (objects.failure(there) or self._has_other_recipe(there)):
            logger.info("%s: deleting %s %s of an earlier try", self._stage, self._kind, self._name)
            self._kubectl.run(
                "delete", self._kind, self._name, "--cascade=foreground", "--wait=false"
            )
            while self._kubectl.get(self._kind, self._name):
                stop_if_requested(f"{self._kind} {self._name} is being deleted")
                time.sleep(1)
        elif there:
            return
        self._kubectl.apply([self._job])
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
        if objects.is_complete(job):
            return EXIT_DONE
        if not (failed := objects.failure(job)):
            return None
        logger.error("%s failed: %s: %s", self._stage, failed.get("reason"), failed.get("message"))
        reported = re.search(r"exit code (\d+)", str(failed.get("message")))
        code, pod = objects.decisive(pods)
        if pod:
            self._show_log(pod)
        elif reported:  # the pods are gone; the Job's own message still holds the code
            code = int(reported[1])
        return code

    def _show_log(self, pod: Object) -> None:
        name = objects.name_of(pod)
        try:
            text = self._kubectl.run("logs", name, "--tail", _LOG_LINES)
        except (UserError, RetryableError) as error:
            text = f"its log cannot be read: {error}"
        sys.stderr.write(f"--- the end of {name}'s log\n{text.rstrip()}\n---\n")

    def _report(self, job: Object, pods: Sequence[Object]) -> None:
        """Log what has changed: counts of pods, failed attempts, pods that cannot start."""
        for pod in pods:
            name = objects.name_of(pod)
            for line in objects.failures(pod):
                self._once(line, logging.WARNING)
            reason, message = objects.waiting(pod)
            if reason in _CANNOT_START:
                raise UserError(
                    f"{name} cannot start: {reason}: {message}",
                    code="pod-cannot-start",
                    remedy="Correct the image's name or the missing object, then run this again.",
                    facts={"pod": name, "reason": reason},
                )
            if reason in _MAY_START:
                self._once(f"{name} waits: {reason}: {message}", logging.WARNING)
        for line in self._told_by_events(job, pods):
            self._once(line, logging.WARNING)
        if job["spec"].get("suspend"):
            self._once(f"{self._kind} {self._name} is suspended: it waits for its queue")
        status = job.get("status", {})
        if self._kind == "job":
            counts = (status.get(key) or 0 for key in ("ready", "succeeded", "failed"))
            total = job["spec"].get("completions") or 1
            running, done, failed = counts
            self._once(f"pods: {running} running, {done} done, {failed} failed, of {total}")

    def _told_by_events(self, job: Object, pods: Sequence[Object]) -> list[str]:
        """Warnings on the Job and its pods; none where the events may not be read."""
        if not self._reads_events:
            return []
        try:
            events = self._kubectl.get("events", "--field-selector", "type=Warning")
        except UserError as error:
            logger.warning("events cannot be read, so some causes will not be told: %s", error)
            self._reads_events = False
            return []
        except RetryableError:  # the next look at the Job says so
            return []
        names = {*objects.job_names(job), *map(objects.name_of, pods)}
        since = str(job["metadata"].get("creationTimestamp", ""))
        return list(objects.told_by_events(events.get("items", ()), names, since))

    def _once(self, line: str, level: int = logging.INFO) -> None:
        if line not in self._reported:
            self._reported.add(line)
            logger.log(level, "%s: %s", self._stage, line)
