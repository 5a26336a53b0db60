# SPDX-License-Identifier: Apache-2.0
"""What Jobs, JobSets, their pods and the cluster's events say.

In: objects as `kubectl get --output json` gives them. Out: how a Job ended, exit codes, and lines for a
person: what a pod waits for, why it was taken away, and warnings that stand in events alone (a volume
that does not mount, a quota, a policy).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from shared.errors import EXIT_BUG, EXIT_OUTPUT, EXIT_RETRY, EXIT_USER
from stages.ops.chain.kubernetes.kubectl import Object

_TEXT = 300  # characters of an event's message
# The pod's own status says these already.
_KNOWN_EVENTS = ("BackOff", "BackoffLimitExceeded", "Failed", "FailedScheduling")


def name_of(each: Object) -> str:
    """The name of an object."""
    return str(each["metadata"]["name"])


def _condition(job: Object, *kinds: str) -> Mapping[str, Any]:
    """The first condition of one of these kinds that holds; {} if none does."""
    conditions = job.get("status", {}).get("conditions") or ()
    for kind in kinds:
        for each in conditions:
            if each["type"] == kind and each["status"] == "True":
                return dict(each)
    return {}


def is_complete(job: Object) -> bool:
    """Whether all its pods have done their work; a JobSet says Completed."""
    return bool(_condition(job, "Complete", "Completed"))


def failure(job: Object) -> Mapping[str, Any]:
    """The condition that says why it failed; {} if it has not."""
    # A Job has FailureTarget while its last pods still end: minutes before Failed.
    return _condition(job, "Failed", "FailureTarget")


def has_ended(job: Object) -> bool:
    """Whether no pod of it runs any more."""
    return bool(_condition(job, "Complete", "Completed", "Failed"))


def job_names(job: Object) -> list[str]:
    """A Job's name; a JobSet's, and those of the Jobs that its controller makes."""
    name, replicated = name_of(job), job["spec"].get("replicatedJobs") or ()
    counts = ((each["name"], each.get("replicas", 1)) for each in replicated)
    return [name, *(f"{name}-{part}-{i}" for part, replicas in counts for i in range(replicas))]


def config_maps(job: Object) -> list[str]:
    """Names of the ConfigMaps that its pods mount: kustomize hashes their content into the name."""
    return _mounted(job, "configMap", "name")


def claims(job: Object) -> list[str]:
    """Names of the persistent volume claims that its pods mount."""
    return _mounted(job, "persistentVolumeClaim", "claimName")


def arguments(job: Object) -> list[str]:
    """The words of its containers' commands, and of a shell's script among them."""
    containers = [each for pod in _pods(job) for each in pod.get("containers") or ()]
    parts = [each.get(key) or () for each in containers for key in ("command", "args")]
    return [word for part in parts for text in part for word in str(text).split()]


def _pods(job: Object) -> list[Object]:
    replicated = job["spec"].get("replicatedJobs") or [{"template": job}]
    return [each["template"]["spec"]["template"]["spec"] for each in replicated]


def _mounted(job: Object, kind: str, field: str) -> list[str]:
    volumes = [volume for pod in _pods(job) for volume in pod.get("volumes") or ()]
    return sorted({each[kind][field] for each in volumes if kind in each})


def _statuses(pod: Object) -> list[Object]:
    return list(pod.get("status", {}).get("containerStatuses") or ())


def _ends(pod: Object) -> Iterator[Object]:
    for each in _statuses(pod):
        if (ended := each.get("state", {}).get("terminated") or {}).get("exitCode"):
            yield ended


def exit_code(pod: Object) -> int:
    """What the pod's container ended with; 0 while it runs, and if that is not known."""
    return next((int(each["exitCode"]) for each in _ends(pod)), 0)


def failures(pod: Object) -> Iterator[str]:
    """Lines on what has gone wrong with a pod: an exit code, an eviction, a lost node."""
    name = name_of(pod)
    for ended in _ends(pod):
        reason = ended.get("reason") or "Error"
        more = "" if reason == "Error" else f" ({reason})"
        yield f"{name} ended with exit code {ended['exitCode']}{more}"
    for reason, message in _taken_away(pod):
        yield f"{name} is taken from its node: {reason}: {message}"


def _taken_away(pod: Object) -> Iterator[tuple[str, str]]:
    """(reason, message): evicted, preempted, drained, or on a node that does not answer."""
    status = pod.get("status", {})
    if status.get("reason"):
        yield str(status["reason"]), str(status.get("message", ""))
    for each in status.get("conditions") or ():
        if each.get("type") == "DisruptionTarget" and each.get("status") == "True":
            yield str(each.get("reason")), str(each.get("message", ""))


def waiting(pod: Object) -> tuple[str, str]:
    """(reason, message) of what a pod waits for: its image, or a node; two empty texts if nothing."""
    reasons = [each.get("state", {}).get("waiting") or {} for each in _statuses(pod)]
    conditions = pod.get("status", {}).get("conditions") or ()
    reasons += [each for each in conditions if each.get("type") == "PodScheduled"]
    for each in reasons:
        if each.get("reason"):
            return str(each["reason"]), str(each.get("message", ""))
    return "", ""


def told_by_events(events: Sequence[Object], names: Collection[str], since: str) -> Iterator[str]:
    """Lines of warnings on objects of these names.

    Args:
        events: of the namespace.
        names: the Job, and its pods.
        since: time of the Job's creation; an earlier Job may have had its name.
    """
    for each in events:
        about, reason = each.get("involvedObject", {}).get("name"), each.get("reason")
        at = str(each.get("lastTimestamp") or each.get("eventTime") or since)
        if about in names and reason not in _KNOWN_EVENTS and at[:19] >= since[:19]:
            yield f"{about}: {reason}: {str(each.get('message', '')).strip()[:_TEXT]}"


def decisive(pods: Sequence[Object]) -> tuple[int, Object | None]:
    """Exit code of a failed Job, and the pod that it is from.

    Of several pods the one whose code the Job's policy acts upon, else the one that ended last. Pods
    that were taken away before they had a code are worth another try.
    """

    def weight(pod: Object) -> tuple[bool, str]:
        ended_at = max((str(each.get("finishedAt", "")) for each in _ends(pod)), default="")
        return exit_code(pod) in (EXIT_USER, EXIT_OUTPUT), ended_at

    if ended := [pod for pod in pods if exit_code(pod)]:
        pod = max(ended, key=weight)
        return exit_code(pod), pod
    lost = any(True for pod in pods for _ in _taken_away(pod))
    return (EXIT_RETRY if lost else EXIT_BUG), None
