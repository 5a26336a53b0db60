# SPDX-License-Identifier: Apache-2.0
"""Runs the pod template of a rendered Job with podman, as it is written.

In: a Job of an overlay, and volumes for its claims. Out: the container's exit code, its log and what
podman says of it. Costs the stage's own time and half a second. The surprise: podman plays pods, not
Jobs, and is no kubelet. Two things are therefore done here: the template becomes a Pod, and a memory
emptyDir becomes a folder in this machine's /dev/shm that all may write, where podman 4.3 would give a
folder of root's on a disk. Of the other fields each is either played or stands in IGNORED; one that is
in neither list is refused, so that none is passed over in silence.
"""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CONTAINER = "containers[]."
PLAYED = {
    "restartPolicy",
    "securityContext.runAsGroup",
    "securityContext.runAsNonRoot",
    "securityContext.runAsUser",
    "volumes[].configMap.name",
    "volumes[].emptyDir.medium",
    "volumes[].name",
    "volumes[].persistentVolumeClaim.claimName",
    *(
        CONTAINER + name
        for name in (
            "args[]",
            "command[]",
            "envFrom[].configMapRef.name",
            "envFrom[].configMapRef.optional",
            "envFrom[].secretRef.name",
            "envFrom[].secretRef.optional",
            "image",
            "name",
            "resources.limits.cpu",
            "resources.limits.memory",
            "securityContext.allowPrivilegeEscalation",
            "securityContext.capabilities.drop[]",
            "securityContext.readOnlyRootFilesystem",
            "volumeMounts[].mountPath",
            "volumeMounts[].name",
            "volumeMounts[].readOnly",
        )
    ),
}
# What podman 4.3 takes and does nothing with, and why that is no loss here.
IGNORED = {
    "automountServiceAccountToken": "there is no API server",
    "enableServiceLinks": "there are no Services",
    "securityContext.fsGroup": "the workspace belongs to the pod's user already",
    "securityContext.fsGroupChangePolicy": "likewise",
    "securityContext.seccompProfile.type": "podman's own profile is on wherever none is named",
    "terminationGracePeriodSeconds": "nobody stops these pods",
    "volumes[].emptyDir.sizeLimit": "neither memory nor disk has a limit of its own here",
}


def fields(value: object, path: str = "") -> Iterator[str]:
    """Where the leaves of a manifest stand; `[]` for any place in a list."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from fields(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for inner in value:
            yield from fields(inner, f"{path}[]")
    else:
        yield path


@dataclasses.dataclass(frozen=True)
class Ended:
    """A pod's one container, after its end."""

    code: int
    log: str
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Podman:
    """A podman with images, volumes and settings of its own, all below one folder."""

    folder: Path

    @property
    def memory(self) -> Path:
        """Where this machine's memory can be had as a folder."""
        return Path("/dev/shm") / self.folder.name

    def run(self, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """A podman command that must succeed."""
        settings = self.folder / "containers.conf"
        # A process here may not raise its limits; and crun refuses the mixed cgroups of some hosts.
        runtime = '[engine]\nruntime = "runc"\n' if shutil.which("runc") else ""
        limits = 'default_ulimits = ["nofile=10000:10000", "nproc=4096:4096"]'
        settings.write_text(f"[containers]\n{limits}\n{runtime}")
        done = subprocess.run(
            [
                "podman",
                "--root",
                self.folder / "root",
                "--runroot",
                self.folder / "run",
                *arguments,
            ],
            env={**os.environ, "CONTAINERS_CONF": str(settings)},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr[-2000:]}"
        return done

    def claim(self, name: str, *options: str) -> None:
        """The volume that a claim of this name finds."""
        words = [word for option in options for word in ("--opt", option)]
        self.run("volume", "create", *words, name)

    def play(self, job: dict[str, Any], others: list[dict[str, Any]]) -> Ended:
        """Run the Job's template once, to its end, with these objects beside it."""
        pod = self.pod(job)
        for volume in pod["spec"]["volumes"]:
            if "hostPath" in volume:
                folder = Path(volume["hostPath"]["path"])
                folder.mkdir(parents=True)
                folder.chmod(0o1777)  # as a kubelet makes it
        (container,) = pod["spec"]["containers"]
        name = f"{pod['metadata']['name']}-{container['name']}"
        manifest = self.folder / f"{name}.yaml"
        manifest.write_text(yaml.safe_dump_all([*others, pod]))
        self.run("kube", "play", "--network", "none", str(manifest))
        try:
            code = int(self.run("wait", name).stdout)
            log = self.run("logs", name)
            (facts,) = json.loads(self.run("inspect", name).stdout)
            return Ended(code, log.stdout + log.stderr, facts)
        finally:
            self.run("kube", "down", str(manifest))
            shutil.rmtree(self.memory)

    def pod(self, job: dict[str, Any]) -> dict[str, Any]:
        """The Job's template as a Pod, every field of it known."""
        template = copy.deepcopy(job["spec"]["template"])
        unknown = set(fields(template["spec"])) - PLAYED - IGNORED.keys()
        assert not unknown, f"podman might pass over {sorted(unknown)}"
        for volume in template["spec"]["volumes"]:
            if volume.get("emptyDir", {}).get("medium") == "Memory":
                del volume["emptyDir"]
                volume["hostPath"] = {
                    "path": str(self.memory / volume["name"]),
                    "type": "Directory",
                }
        metadata = {**template["metadata"], "name": job["metadata"]["name"]}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}

    def clear(self) -> None:
        """Remove everything: images are gigabytes."""
        self.run("rmi", "--all", "--force")
        # Podman mounts its store over itself and leaves it so.
        subprocess.run(["umount", self.folder / "root" / "overlay"], capture_output=True)
        shutil.rmtree(self.folder)
