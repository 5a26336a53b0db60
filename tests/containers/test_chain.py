# SPDX-License-Identifier: Apache-2.0
"""`make demo-compose`, small: killed in the middle of synth, stopped in the middle of train, finished.

The story is told once, by a fixture; each test looks at one thing that must hold afterwards.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from shared.contracts import conversations
from tests.conftest import MadeTarget
from tests.containers.conftest import CHAIN, ROOT, STAGES, Project, docker, wait_for

pytestmark = [pytest.mark.container, pytest.mark.engine]

KILLED, STOPPED = 137, 143
PARTS = 8  # that synth writes in the smoke recipe


@dataclasses.dataclass(frozen=True)
class Made:
    """One `make demo-compose`, after its end."""

    code: int
    log: str


@dataclasses.dataclass(frozen=True)
class Story:
    """What was seen while the chain ran."""

    run: Path
    killed: int  # exit code of the synth that was killed
    parts: dict[str, str]  # its whole parts, name -> SHA-256
    stopping_s: float  # of the train that was asked to stop
    grace_s: int
    stopped: Made
    finished: Made


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


def make_demo(project: Project) -> "subprocess.Popen[str]":
    """`make demo-compose` with the smoke recipe, in this project's workspace."""
    settings = {"EYRIE_RUN": "smoke", "EYRIE_WORKSPACE": project.workspace}
    words = [f"{name}={value}" for name, value in settings.items()]
    return subprocess.Popen(
        ["make", "demo-compose", f"WORKSPACE={project.workspace}", *words],
        cwd=ROOT,
        env=project.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(make: "subprocess.Popen[str]") -> Made:
    log, _ = make.communicate(timeout=900)
    return Made(make.returncode, log)


def stop_train(project: Project, run: Path) -> tuple[Made, float, int]:
    """The chain, and a stop once train has a checkpoint: its end, the stop's seconds, the grace."""
    make = make_demo(project)
    try:
        latest = run / "train" / "checkpoints" / "latest.pt"
        wait_for("checkpoint", lambda: latest.exists() or make.poll() is not None, 900)
        assert latest.exists(), "the chain ended before train had a checkpoint"
        labels = [f"com.docker.compose.project={project.name}", "com.docker.compose.service=train"]
        named = [word for label in labels for word in ("--filter", f"label={label}")]
        container = docker("ps", "--quiet", *named).stdout.strip()
        (facts,) = json.loads(docker("inspect", container).stdout)
        began_s = time.monotonic()
        docker("stop", "--time", "60", container)
        return ended(make), time.monotonic() - began_s, facts["Config"]["StopTimeout"]
    finally:
        make.kill()


@pytest.fixture(scope="module")
def story(project: Project, demo_target: MadeTarget) -> Story:
    workspace = Path(project.workspace)
    shutil.copytree(demo_target.folder, workspace / "targets" / "demo")
    recipe = yaml.safe_load(project.recipe.read_text())
    run = workspace / recipe["run"]["name"]
    killed, parts = kill_synth(project, run)
    stopped, stopping_s, grace_s = stop_train(project, run)
    finished = ended(make_demo(project))
    return Story(run, killed, parts, stopping_s, grace_s, stopped, finished)


def manifest(story: Story, stage: str) -> dict[str, object]:
    return dict(json.loads((story.run / stage / "manifest.json").read_text()))


def test_the_chain_ends_above_the_gate(story: Story) -> None:
    assert story.finished.code == 0, story.finished.log[-3000:]
    report = json.loads((story.run / "bench" / "report.json").read_text())
    assert report["head"]["acceptance"]["acceptance_length"] >= 2.1


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_tells_how_far_it_is(story: Story, stage: str) -> None:
    told = story.stopped.log + story.finished.log
    assert f"demo-compose: {stage}\n" in told
    assert re.search(rf"INFO {stage} \w+=\d+/\d+ .*left_s=", told), told[-3000:]


def test_the_last_line_names_the_report(story: Story) -> None:
    named = re.search(r"^demo-compose: report=([^;]+);", story.finished.log.splitlines()[-1])
    assert named
    assert "acceptance length" in Path(named[1]).read_text().lower()


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
    assert story.stopped.code != 0
    assert f"demo-compose: train ended with exit code {STOPPED};" in story.stopped.log
    assert "demo-compose: bench" not in story.stopped.log
    assert story.stopping_s < story.grace_s
    log = (story.run / "logs" / "train.log").read_text()
    assert "stopped by a signal" in log
    assert "continuing from step" in log


@pytest.mark.parametrize("stage", [*STAGES, "export"])
def test_manifests_name_the_image(story: Story, images: dict[str, str], stage: str) -> None:
    provenance = manifest(story, stage)["provenance"]
    image = images["train" if stage == "export" else stage]
    assert provenance["image"] == image  # type: ignore[index]
    assert provenance["revision"] not in ("", "unknown")  # type: ignore[index]


def test_a_finished_chain_is_done_at_once(story: Story, project: Project) -> None:
    began_s = time.monotonic()
    again = project.compose("run", "--rm", "bench", files=CHAIN)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "already done" in again.stderr
    assert time.monotonic() - began_s < 60


def test_codes_reach_the_caller(story: Story, project: Project) -> None:
    wrong = project.compose("run", "--rm", "dump", "--no_such_flag", "1")
    assert wrong.returncode == 2
    assert "no_such_flag" in wrong.stderr
    missed = ("--recipe", "/etc/eyrie/recipe.yaml", "--max_prompts", "1")
    refused = project.compose("run", "--rm", "bench", *missed)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
