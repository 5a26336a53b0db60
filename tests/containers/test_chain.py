# SPDX-License-Identifier: Apache-2.0
"""One chain in containers: killed in the middle of synth, stopped in the middle of train, finished.

The story is told once, by a fixture; each test looks at one thing that must hold afterwards.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from shared.contracts import conversations
from tests.conftest import MadeTarget
from tests.containers.conftest import CHAIN, STAGES, STREAM, Project, docker, wait_for

pytestmark = [pytest.mark.container, pytest.mark.engine]

KILLED, STOPPED = 137, 143
PARTS = 8  # that synth writes in the smoke recipe


@dataclasses.dataclass(frozen=True)
class Story:
    """What was seen while the chain ran."""

    run: Path
    killed: int  # exit code of the synth that was killed
    parts: dict[str, str]  # its whole parts, name -> SHA-256
    stopped: int  # exit code of the train that was asked to stop
    stopping_s: float
    chain: int  # exit code of the `up` whose train was stopped
    finished: subprocess.CompletedProcess[str]
    hosts: dict[str, dict[str, object]]  # stage -> HostConfig of its container
    users: dict[str, str]
    grace_s: int


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("part-*.parquet"))
    }


def kill_synth(project: Project, run: Path) -> tuple[int, dict[str, str]]:
    """`up`, and a kill once a part is whole: the exit code, and the parts.

    The engine writes a container's state to disk before it kills. Images that were built a moment ago
    have been seen to hold that up for longer than the remaining parts took: hence the sync, and the
    second try.
    """
    for _ in range(3):
        os.sync()
        up = project.compose("up", "--detach", "synth")
        assert up.returncode == 0, up.stderr[-2000:]
        wait_for("part", lambda: digests(run / "synth"))
        assert project.compose("kill", "synth").returncode == 0
        parts = digests(run / "synth")
        if len(parts) < PARTS:
            break
        shutil.rmtree(run)
    return project.inspect("synth")["State"]["ExitCode"], parts


def stop_train(project: Project, run: Path) -> tuple[int, float, int]:
    """The chain, and a stop once train has a checkpoint: its code, its seconds, the chain's code."""
    chain = project.start("up", "--detach", "bench", files=CHAIN)
    try:
        latest = run / "train" / "checkpoints" / "latest.pt"
        wait_for("checkpoint", lambda: latest.exists() or chain.poll() is not None, 900)
        assert latest.exists(), "the chain ended before train had a checkpoint"
        container, began_s = project.container("train"), time.monotonic()
        docker("stop", "--time", "60", container)
        stopping_s = time.monotonic() - began_s
        return project.inspect("train")["State"]["ExitCode"], stopping_s, chain.wait(timeout=120)
    finally:
        chain.kill()


@pytest.fixture(scope="module")
def story(project: Project, demo_target: MadeTarget) -> Story:
    workspace = Path(project.workspace)
    shutil.copytree(demo_target.folder, workspace / "targets" / "demo")
    recipe = yaml.safe_load(project.recipe.read_text())
    run = workspace / recipe["run"]["name"]
    killed, parts = kill_synth(project, run)
    stopped, stopping_s, chain = stop_train(project, run)
    hosts = {stage: project.inspect(stage) for stage in ("synth", "dump", "train")}
    finished = project.compose("run", "--name", f"{project.name}-last", "bench", files=CHAIN)
    (hosts["bench"],) = json.loads(docker("inspect", f"{project.name}-last").stdout)
    docker("rm", "--force", f"{project.name}-last")
    return Story(
        run=run,
        killed=killed,
        parts=parts,
        stopped=stopped,
        stopping_s=stopping_s,
        chain=chain,
        finished=finished,
        hosts={stage: facts["HostConfig"] for stage, facts in hosts.items()},
        users={stage: facts["Config"]["User"] for stage, facts in hosts.items()},
        grace_s=hosts["train"]["Config"]["StopTimeout"],
    )


def manifest(story: Story, stage: str) -> dict[str, object]:
    return dict(json.loads((story.run / stage / "manifest.json").read_text()))


def test_the_chain_ends_above_the_gate(story: Story) -> None:
    assert story.finished.returncode == 0, story.finished.stderr[-3000:]
    report = json.loads((story.run / "bench" / "report.json").read_text())
    assert report["head"]["acceptance"]["acceptance_length"] >= 2.1


def test_a_killed_synth_continues_and_loses_nothing(story: Story) -> None:
    assert story.killed == KILLED
    assert 0 < len(story.parts) < PARTS
    now = digests(story.run / "synth")
    assert len(now) >= PARTS
    assert {name: now[name] for name in story.parts} == story.parts
    rows = [row.sample_id for row in conversations.read_conversations(story.run / "synth")]
    counts = manifest(story, "synth")["counts"]
    assert len(rows) == len(set(rows)) == counts["ok"] == counts["in"] == 400  # type: ignore[index]


def test_a_stopped_train_has_saved_and_continues(story: Story) -> None:
    assert story.stopped == STOPPED
    assert story.stopping_s < story.grace_s
    assert story.chain != 0  # the stages after it must not have started
    log = (story.run / "logs" / "train.log").read_text()
    assert "stopped by a signal" in log
    assert "continuing from step" in log


@pytest.mark.parametrize("stage", STAGES)
def test_containers_may_do_nothing_that_they_need_not(story: Story, stage: str) -> None:
    host = story.hosts[stage]
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"] and not host["Privileged"]
    assert "no-new-privileges:true" in host["SecurityOpt"]  # type: ignore[operator]
    assert story.users[stage] == f"{os.getuid() or 2000}:0"


@pytest.mark.parametrize("stage", [*STAGES, "export"])
def test_manifests_name_the_image(story: Story, images: dict[str, str], stage: str) -> None:
    provenance = manifest(story, stage)["provenance"]
    image = images["train" if stage == "export" else stage]
    assert provenance["image"] == image  # type: ignore[index]
    assert provenance["revision"] not in ("", "unknown")  # type: ignore[index]


def test_a_finished_stage_is_done_at_once(story: Story, project: Project) -> None:
    began_s = time.monotonic()
    again = project.compose("run", "--rm", "--no-deps", "train", files=CHAIN)
    assert again.returncode == 0
    assert "already done" in again.stderr
    assert time.monotonic() - began_s < 60  # the training alone takes minutes


def test_codes_reach_the_caller(story: Story, project: Project) -> None:
    wrong = project.compose("run", "--rm", "dump", "--no_such_flag", "1")
    assert wrong.returncode == 2
    assert "no_such_flag" in wrong.stderr
    missed = ("--recipe", "/etc/eyrie/recipe.yaml", "--max_prompts", "1")
    refused = project.compose("run", "--rm", "bench", *missed)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr


WINDOW = 4


@pytest.fixture(scope="module")
def streamed(story: Story, project: Project) -> Iterator[tuple[Path, int, int, int]]:
    """dump with a window and train beside it, on the chain's answers.

    Yields:
        the run, the exit codes of dump and of train, and the most shards that lay there at a time.
    """
    recipe = yaml.safe_load(project.recipe.read_text())
    recipe["run"]["name"] = "stream"
    recipe["dump"] |= {"window_shards": WINDOW, "shard_bytes": 8_000_000}
    recipe["train"] |= {"follow": True, "epochs": 1}
    run = story.run.with_name("stream")
    shutil.copytree(story.run / "synth", run / "synth")
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    for each in (run, *run.rglob("*")):
        os.chown(each, int(project.variables["EYRIE_UID"]), -1)
    own = dataclasses.replace(project, name=f"{project.name}-stream", recipe=path)
    both = own.start("run", "--rm", "train", files=STREAM)
    most, deadline = 0, time.monotonic() + 900
    try:
        while both.poll() is None and time.monotonic() < deadline:
            most = max(most, len(list((run / "dump").glob("shard_*.pt"))))
            time.sleep(0.02)
        of_dump = int(docker("wait", own.container("dump"), timeout=300).stdout)
        yield run, of_dump, both.wait(timeout=60), most
    finally:
        both.kill()
        own.down()


def test_train_beside_dump_needs_a_few_shards_of_disk(
    streamed: tuple[Path, int, int, int],
) -> None:
    run, of_dump, of_train, most = streamed
    assert (of_dump, of_train) == (0, 0)
    assert 2 <= most <= WINDOW
    made, left = (len(list((run / "dump").glob(f"shard_*.{end}"))) for end in ("json", "pt"))
    assert made > left <= WINDOW
    assert (run / "export" / "model.safetensors").exists()
