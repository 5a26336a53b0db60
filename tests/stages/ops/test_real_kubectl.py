# SPDX-License-Identifier: Apache-2.0
"""`ops run --by kubernetes` with a real kubectl and a real overlay, against a scripted API server."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stages.ops.api_server import ApiServer

ROOT = Path(__file__).resolve().parents[3]
OVERLAY = ROOT / "compose" / "k8s" / "overlays" / "cpu"
RECIPE = ROOT / "compose" / "recipes" / "smoke" / "recipe.yaml"

# `python -m stages.ops`, but the cluster is asked again at once.
IMPATIENT = """
import runpy
from stages.ops.chain.kubernetes import jobs
jobs._POLL_S = 0.05
runpy.run_module("stages.ops", run_name="__main__", alter_sys=True)
"""

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")


@pytest.fixture
def server() -> Iterator[ApiServer]:
    server = ApiServer()
    for claim in ("eyrie-workspace", "eyrie-models"):
        server.put("persistentvolumeclaims", {"metadata": {"name": claim}})
    yield server
    server.shutdown()
    server.server_close()


def start(server: ApiServer, folder: Path, *, is_patient: bool = False) -> "subprocess.Popen[str]":
    words = ["-m", "stages.ops"] if is_patient else ["-c", IMPATIENT]
    command = [sys.executable, *words, "run", "--by", "kubernetes"]
    command += ["--overlay", str(OVERLAY), "--recipe", str(RECIPE)]
    settings = {"KUBECONFIG": str(server.kubeconfig(folder)), "HOME": str(folder)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **settings, "NO_PROXY": "127.0.0.1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_job(server: ApiServer, name: str, process: "subprocess.Popen[str]") -> dict[str, Any]:
    while ("jobs", name) not in server.objects:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    return server.objects["jobs", name]


def end(server: ApiServer, job: dict[str, Any], **condition: str) -> None:
    server.put("jobs", {**job, "status": {"conditions": [{"status": "True", **condition}]}})


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    """The log as far as the line with this text."""
    assert process.stderr
    log = ""
    for line in process.stderr:
        log += line
        if text in line:
            return log
    raise AssertionError(f"no {text!r} in {log}")


def a_pod(name: str, job: str, **status: Any) -> dict[str, Any]:
    containers = [{"name": "c"}]
    metadata = {"name": name, "labels": {"job-name": job}}
    return {"metadata": metadata, "spec": {"containers": containers}, "status": status}


def test_a_failed_stage_is_reported_within_30_s_with_its_exit_code(
    server: ApiServer, tmp_path: Path
) -> None:
    process = start(server, tmp_path, is_patient=True)
    end(server, wait_for_job(server, "target-smoke", process), type="Complete")
    job = wait_for_job(server, "synth-smoke", process)
    refused = {"state": {"terminated": {"exitCode": 2, "reason": "Error"}}, "name": "synth"}
    server.put("pods", a_pod("synth-smoke-0-abc", "synth-smoke", containerStatuses=[refused]))
    server.logs["synth-smoke-0-abc"] = "error (user): no prompts\n"
    failed_s = time.monotonic()
    end(server, job, type="FailureTarget", reason="PodFailurePolicy", message="exit code 2")
    _, log = process.communicate(timeout=60)
    assert time.monotonic() - failed_s < 30
    assert process.returncode == 2, log
    assert "synth failed: PodFailurePolicy" in log
    assert "error (user): no prompts" in log
    assert ("jobs", "dump-smoke") not in server.objects


def test_an_evicted_pod_and_warnings_are_told(server: ApiServer, tmp_path: Path) -> None:
    """With an API server that is away for a moment in between."""
    process = start(server, tmp_path)
    job = wait_for_job(server, "target-smoke", process)
    low = "The node was low on resource: ephemeral-storage."
    lost = a_pod("target-smoke-x", "target-smoke", phase="Failed", reason="Evicted", message=low)
    server.put("pods", lost)
    event = {
        "type": "Warning",
        "reason": "FailedCreate",
        "message": "exceeded quota: team, requested: cpu=2",
        "involvedObject": {"kind": "Job", "name": "target-smoke"},
    }
    server.put("events", {"metadata": {"name": "e1"}, **event})
    log = read_until(process, "FailedCreate")
    server.refusals["jobs"] = 503
    while not server.refused:
        assert process.poll() is None
        time.sleep(0.05)
    del server.refusals["jobs"]
    end(server, job, type="Failed", reason="BackoffLimitExceeded", message="limit reached")
    log += process.communicate(timeout=60)[1]
    assert f"target-smoke-x is taken from its node: Evicted: {low}" in log
    assert log.count("target-smoke: FailedCreate: exceeded quota") == 1
    assert process.returncode == 75, log


def test_a_missing_claim_is_refused_before_the_first_job(server: ApiServer, tmp_path: Path) -> None:
    del server.objects["persistentvolumeclaims", "eyrie-models"]
    _, log = (process := start(server, tmp_path)).communicate(timeout=60)
    assert process.returncode == 2, log
    assert "expected the claim eyrie-models" in log and "storage.yaml" in log
    assert not any(resource == "jobs" for resource, _ in server.objects)


def test_who_may_not_read_events_and_claims_may_run_all_the_same(
    server: ApiServer, tmp_path: Path
) -> None:
    server.refusals |= {"persistentvolumeclaims": 403, "events": 403}
    process = start(server, tmp_path)
    job = wait_for_job(server, "target-smoke", process)
    log = read_until(process, "pods: ")  # said after a look at the events
    looks = server.asked.count("jobs")
    while server.asked.count("jobs") < looks + 3:  # at least one whole look more
        assert process.poll() is None
        time.sleep(0.05)
    end(server, job, type="Failed", reason="DeadlineExceeded", message="")
    log += process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert log.count("events cannot be read") == 1
