# SPDX-License-Identifier: Apache-2.0
"""`ops run --by kubernetes`: a stage applied, followed and reported, on a scripted cluster."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.errors import UserError
from stages.ops.chain.kubernetes.objects import arguments
from tests.quick.ops.chain.kubernetes.cluster import (
    COMPLETE,
    RECIPE,
    WITHIN_S,
    Cluster,
    a_claim,
    a_job,
    config,
    failed,
    pod,
)


def test_a_chain_that_goes_well(cluster: Cluster) -> None:
    running = {"ready": 2, "succeeded": 0}
    cluster.script(synth=[{}, running, COMPLETE], dump=[COMPLETE])
    process = cluster.start("--only", "synth,dump")
    _, log = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0, log
    assert "synth: pods: 2 running, 0 done, 0 failed, of 2" in log
    assert "dump: done" in log
    applied = sorted(path.stem for path in (cluster.folder / "objects").iterdir())
    assert applied == ["configmap-recipe-abc", "job-dump-r", "job-synth-r"]


@pytest.mark.parametrize(
    "container",
    [
        {"args": ["--window_shards", "2000"]},
        {"args": ["--window-shards=2000"]},
        {"command": ["python", "-m", "stages.dump", "--window_shards", "2000"], "args": None},
        {"command": ["sh", "-c", "python -m stages.dump --window_shards 2000"]},
    ],
)
def test_an_overlay_with_a_window_of_shards_is_not_followed_job_by_job(
    cluster: Cluster, container: dict[str, Any]
) -> None:
    """dump would wait for train, whose Job is not there yet."""
    objects = [*yaml.safe_load_all((cluster.folder / "rendered.yaml").read_text())]
    pod = objects[2]["spec"]["template"]["spec"]
    pod["containers"] = [{"name": "dump", **container}]
    (cluster.folder / "rendered.yaml").write_text(yaml.safe_dump_all(objects))
    code, log = cluster.run()
    assert code == 2 and "dump and train run at the same time" in log
    assert not any((cluster.folder / "objects").iterdir())
    cluster.script(synth=[COMPLETE])
    assert cluster.run("--only", "synth")[0] == 0


@pytest.mark.parametrize("pod", [{}, {"containers": None}, {"containers": [{"args": None}]}])
def test_a_job_may_leave_its_words_out(pod: dict[str, Any]) -> None:
    assert arguments({"spec": {"template": {"spec": pod}}}) == []


@pytest.mark.parametrize("kind", ["Failed", "FailureTarget"])
def test_a_failed_stage_is_reported_with_its_own_code(cluster: Cluster, kind: str) -> None:
    cluster.script(synth=[{}, failed("PodFailurePolicy", "refused", kind)])
    others = [pod("synth-r-0", terminated={"exitCode": 137}), pod("synth-r-1", running={})]
    cluster.pods(synth=[*others, pod("synth-r-2", terminated={"exitCode": 2})])
    code, log = cluster.run()
    assert code == 2
    assert "the last words of synth-r-2" in log
    assert "synth failed: PodFailurePolicy: refused" in log
    assert not (cluster.folder / "objects" / "job-dump-r.json").exists()


def test_pods_that_are_gone_leave_their_code_in_the_jobs_message(cluster: Cluster) -> None:
    cluster.script(
        synth=[failed("PodFailurePolicy", "Container synth failed with exit code 3 ...")]
    )
    assert cluster.run()[0] == 3


def test_a_failed_shard_is_told_while_the_others_go_on(cluster: Cluster) -> None:
    cluster.script(synth=[{"ready": 1, "failed": 1}, {"ready": 1, "failed": 1}, COMPLETE])
    cluster.pods(
        synth=[pod("synth-r-0", terminated={"exitCode": 75}), pod("synth-r-1", running={})]
    )
    code, log = cluster.run("--only", "synth")
    assert code == 0
    assert log.count("synth-r-0 ended with exit code 75") == 1


def test_a_failed_job_or_one_of_another_recipe_is_replaced_and_a_complete_one_kept(
    cluster: Cluster,
) -> None:
    cluster.put({**a_job("synth"), "status": failed("BackoffLimitExceeded")})
    cluster.put({**a_job("dump", recipe="recipe-old"), "status": COMPLETE})
    cluster.put({**a_job("train"), "status": COMPLETE})
    cluster.script(synth=[COMPLETE], dump=[COMPLETE])
    code, log = cluster.run("--only", "synth,dump,train")
    assert code == 0, log
    deleted = [each.split()[4] for each in cluster.commands() if " delete " in each]
    assert deleted == ["synth-r", "dump-r"]
    applied = [each for each in cluster.commands() if " apply " in each]
    assert len(applied) == 5  # the ConfigMap for each stage, and two Jobs


@pytest.mark.parametrize("reason", ["InvalidImageName", "CreateContainerConfigError"])
def test_a_pod_that_can_never_start_is_refused(cluster: Cluster, reason: str) -> None:
    cluster.pods(synth=[pod("synth-r-0", waiting={"reason": reason, "message": "why"})])
    code, log = cluster.run()
    assert code == 2
    assert f"synth-r-0 cannot start: {reason}: why" in log


def test_an_image_that_does_not_come_is_told(cluster: Cluster) -> None:
    cluster.script(synth=[{}, {}, COMPLETE])
    cluster.pods(
        synth=[pod("p", waiting={"reason": "ImagePullBackOff", "message": "no such host"})]
    )
    code, log = cluster.run("--only", "synth")
    assert code == 0
    assert "p waits: ImagePullBackOff: no such host" in log


def test_a_signal_ends_the_watching_and_not_the_job(cluster: Cluster) -> None:
    process = cluster.start("--only", "synth")
    path = cluster.folder / "objects" / "job-synth-r.json"
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "job synth-r goes on in the cluster" in log
    assert path.exists()


def test_another_recipe_than_the_overlays_is_refused(cluster: Cluster) -> None:
    cluster.recipe.write_text("run: {name: other, target: t}\n")
    code, log = cluster.run()
    assert code == 2
    assert "found another" in log


def test_an_overlay_without_the_stage_is_refused(cluster: Cluster) -> None:
    rendered = cluster.folder / "rendered.yaml"
    kept = [each for each in yaml.safe_load_all(rendered.read_text()) if each["kind"] != "Job"]
    rendered.write_text(yaml.safe_dump_all(kept))
    code, log = cluster.run()
    assert code == 2
    assert "found 0" in log


def test_a_cluster_that_does_not_answer_is_worth_another_try(cluster: Cluster) -> None:
    (cluster.folder / "away").touch()
    code, log = cluster.run()
    assert code == 75
    assert "does not answer" in log


@pytest.mark.parametrize("flags", [("--by", "kubernetes"), ("--overlay", "folder")])
def test_the_two_flags_need_each_other(tmp_path: Path, flags: tuple[str, ...]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(UserError, match="need each other"):
        config("--recipe", str(recipe), *flags)


@pytest.mark.parametrize("flag", ["--dry_run", "--overwrite", "--open"])
def test_a_flag_that_would_be_passed_over_is_refused(cluster: Cluster, flag: str) -> None:
    refusal = "settings: --by kubernetes takes no --dry_run, --overwrite or --open"
    with pytest.raises(UserError, match=refusal):
        cluster.run(flag)
    assert not (cluster.folder / "commands.txt").exists()


def test_a_missing_claim_is_refused_before_the_first_job(cluster: Cluster) -> None:
    made = a_job("dump")
    volumes = made["spec"]["template"]["spec"]["volumes"]
    volumes.append({"name": "w", "persistentVolumeClaim": {"claimName": "eyrie-workspace"}})
    rendered = cluster.folder / "rendered.yaml"
    objects = [*yaml.safe_load_all(rendered.read_text())]
    kept = [each for each in objects if each["metadata"]["name"] != "dump-r"]
    rendered.write_text(yaml.safe_dump_all([*kept, made]))
    cluster.script(synth=[COMPLETE])
    code, log = cluster.run("--only", "synth")
    assert code == 2
    assert "expected the claim eyrie-workspace in namespace eyrie" in log
    cluster.put(a_claim("eyrie-workspace"))
    assert cluster.run("--only", "synth")[0] == 0


def test_a_running_job_of_another_recipe_is_left_alone(cluster: Cluster) -> None:
    """Even if it is a later stage's, which this run would come to in hours."""
    cluster.put({**a_job("train", recipe="recipe-other"), "status": {"ready": 1}})
    code, log = cluster.run()
    assert code == 2
    assert "job train-r runs with another recipe (recipe-other)" in log
    assert "nameSuffix" in log
    assert not any(" delete " in each or " apply " in each for each in cluster.commands())


def test_the_attempt_that_ended_last_gives_the_code(cluster: Cluster) -> None:
    ends = {"b": (75, "2026-01-01T00:03:00Z"), "a": (137, "2026-01-01T00:02:00Z")}
    cluster.script(synth=[failed("BackoffLimitExceeded")])
    states = {
        name: {"terminated": {"exitCode": code, "finishedAt": at, "reason": "OOMKilled"}}
        for name, (code, at) in ends.items()
    }
    cluster.pods(synth=[pod(name, **state) for name, state in states.items()])
    code, log = cluster.run()
    assert code == 75
    assert "the last words of b" in log


def test_what_a_pod_suffers_is_told_with_its_reason(cluster: Cluster) -> None:
    cluster.script(synth=[{}, {}, COMPLETE])
    killed = pod("p", terminated={"exitCode": 137, "reason": "OOMKilled"})
    taken = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    preempted = pod("q", running={})
    preempted["status"]["conditions"] = [{**taken, "message": "for a pod of higher priority"}]
    cluster.pods(synth=[killed, preempted])
    _, log = cluster.run("--only", "synth")
    assert "p ended with exit code 137 (OOMKilled)" in log
    assert "q is taken from its node: PreemptionByScheduler: for a pod of higher priority" in log


def test_warnings_of_this_job_and_no_others_are_told_once(cluster: Cluster) -> None:
    def event(name: str, reason: str, at: str) -> dict[str, Any]:
        about = {"kind": "Job", "name": name}
        return {"involvedObject": about, "reason": reason, "message": "m", "lastTimestamp": at}

    now, before = "2026-01-02T00:00:01Z", "2026-01-01T00:00:00Z"
    events = [
        event("synth-r", "FailedCreate", now),
        event("synth-r", "FailedMount", before),
        event("synth-r-2", "Other", now),
        event("synth-r", "FailedScheduling", now),
    ]
    (cluster.folder / "events.json").write_text(json.dumps({"items": events}))
    made = a_job("synth")
    made["metadata"]["creationTimestamp"] = "2026-01-02T00:00:00Z"
    cluster.put(made)
    cluster.script(synth=[{}, {}, {}, COMPLETE])
    code, log = cluster.run("--only", "synth")
    assert code == 0
    assert log.count("synth-r: FailedCreate: m") == 1
    assert not any(word in log for word in ("FailedMount", "Other", "FailedScheduling"))
