# SPDX-License-Identifier: Apache-2.0
"""`run --by compose`: what it would have docker do, and whose exit code it leaves with.

`docker` is played by a script that keeps its arguments and does what a stage's container would leave.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.errors import EXIT_STOPPED, UserError
from shared.paths import STAGES, RunPaths
from shared.settings import build
from stages.ops.chain import containers
from stages.ops.chain.machine import Machine
from stages.ops.chain.run import run
from stages.ops.config import RunChainConfig

ROOT = Path(__file__).resolve().parents[4]
VARIABLES = ("COMPOSE_FILE", "EYRIE_RECIPE", "EYRIE_UID", "EYRIE_WORKSPACE")
CPU = ["--file", "compose.yaml", "--file", "compose/cpu.yaml"]
# Plays docker; `play.json` beside it says how each stage ends, and whether it begins at all.
DOCKER = """#!{python}
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
play = json.loads((here / "play.json").read_text())
words = sys.argv[1:]
kept = {{name: os.environ[name] for name in {variables!r} if name in os.environ}}
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps({{"words": words, "cwd": os.getcwd(), "variables": kept}}) + "\\n")
if "run" not in words:
    sys.stderr.write(play.get("complaint", ""))
    sys.exit(bool(play.get("complaint")))
stage = next(word for word in words if word in {stages!r})
root = pathlib.Path(kept["EYRIE_WORKSPACE"]) / "run"
if stage not in play.get("never_begins", ()):
    (root / "status").mkdir(exist_ok=True)
    (root / "status" / f"{{stage}}.json").write_text("{{}}")
if stage in play.get("waits", ()):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (here / "waiting").touch()
    time.sleep(600)
if stage == "bench":
    (root / "bench").mkdir()
    report = {{"head": {{"acceptance": {{"acceptance_length": 2.5}}}}}}
    (root / "bench" / "report.json").write_text(json.dumps(report))
sys.exit(play.get("codes", {{}}).get(stage, 0))
"""


class Stub:
    """The script, what it is told to play, and what it was called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        path = folder / "docker"
        path.write_text(DOCKER.format(python=sys.executable, variables=VARIABLES, stages=STAGES))
        path.chmod(0o755)
        self.play()

    def play(self, **what: Any) -> None:
        (self.folder / "play.json").write_text(json.dumps(what))

    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def stages(self) -> list[str]:
        return [word for call in self.calls() for word in call["words"] if word in STAGES]


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """A docker on the search path, and no nvidia-smi."""
    stub = Stub(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{stub.folder}{os.pathsep}{os.defpath}")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(containers, "ENV_FILE", tmp_path / ".env")
    monkeypatch.setattr(containers, "look", lambda: Machine((), 1 << 40, 1 << 30))
    return stub


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"run": {"target": "nobody/nothing"}}))
    return path


def config(recipe: Path, **flags: str) -> RunChainConfig:
    needed = {"recipe": str(recipe), "workspace": str(recipe.parent / "work"), "by": "compose"}
    return build(RunChainConfig, {"preflight": "false", **needed, **flags})


def test_each_stage_is_a_container_of_its_service(
    docker: Stub, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = recipe.parent / "work"
    assert run(config(recipe)) == 0
    service = ["compose", *CPU, "run", "--rm", "-T"]
    arguments = ["--recipe", "/etc/eyrie/recipe.yaml"]
    assert [call["words"] for call in docker.calls()] == [
        [*service, stage, *arguments] for stage in STAGES
    ]
    (variables,) = {json.dumps(call["variables"]) for call in docker.calls()}
    assert json.loads(variables) == {
        "EYRIE_RECIPE": str(recipe),
        "EYRIE_UID": str(os.getuid() or 2000),
        "EYRIE_WORKSPACE": str(work),
    }
    assert {call["cwd"] for call in docker.calls()} == {str(ROOT)}
    assert (work / "run" / "recipe.yaml").read_text() == recipe.read_text()
    assert (work / "run").stat().st_mode & 0o7777 == 0o2775
    said = capsys.readouterr().out
    assert (
        said
        == f"run: acceptance_length=2.50 head={work}/run/export report={work}/run/bench/report.json\n"
    )


def test_the_same_words_choose_stages_and_files(
    docker: Stub, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    containers.ENV_FILE.write_text("# comment\nCOMPOSE_FILE=other.yaml\nEYRIE_UID=77\n")
    assert run(config(recipe, **{"from": "dump", "skip": "bench"}, overwrite="true")) == 0
    assert docker.stages() == ["dump", "train"]
    words = docker.calls()[0]["words"]
    assert words[:2] == ["compose", "run"]  # compose finds the files itself
    assert words[-1] == "--overwrite"
    assert docker.calls()[0]["variables"]["EYRIE_UID"] == "77"
    containers.ENV_FILE.unlink()
    gpus = Machine((("Toy", 1 << 30),), 1 << 40, 1 << 30)
    monkeypatch.setattr(containers, "look", lambda: gpus)
    command = containers.command_of("synth", config(recipe))
    assert command[:5] == ["docker", "compose", "--file", "compose.yaml", "run"]


@pytest.mark.parametrize("code", [1, 2, 3, 75, 137, 143])
def test_the_exit_code_of_a_stage_is_handed_on(docker: Stub, recipe: Path, code: int) -> None:
    docker.play(codes={"dump": code})
    assert run(config(recipe)) == code
    assert docker.stages() == ["synth", "dump"]


@pytest.mark.parametrize("code", [1, 125])
def test_what_compose_itself_fails_with_is_no_code_of_a_stage(
    docker: Stub, recipe: Path, code: int
) -> None:
    docker.play(codes={"dump": code}, never_begins=["dump"])
    status = RunPaths(recipe.parent / "work", "run").status("dump")
    status.parent.mkdir(parents=True)
    status.touch()
    os.utime(status, (1, 1))  # of an earlier run
    with pytest.raises(UserError, match=f"ended with exit code {code} before dump began"):
        run(config(recipe))


def test_without_docker_it_says_so(
    docker: Stub, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(recipe.parent / "work", "run")
    assert containers.problems(paths) == []
    docker.play(complaint="docker: 'compose' is not a docker command.\n")
    (plugin,) = containers.problems(paths)
    assert plugin == (
        "compose: expected docker with its compose plugin, found: docker: 'compose' is not a docker "
        "command. Install or start it, or leave --by compose out."
    )
    monkeypatch.setenv("PATH", "/nowhere")
    (none,) = containers.problems(paths)
    assert "found: docker: No such file or directory" in none
    with pytest.raises(UserError, match="could not start docker: No such file or directory"):
        run(config(recipe))


def test_a_workspace_of_somebody_else_is_named(
    docker: Stub, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(recipe.parent, "run")
    recipe.parent.chmod(0o755)
    monkeypatch.setenv("EYRIE_UID", "12345")
    (problem,) = containers.problems(paths)
    assert "EYRIE_UID: expected a user who can write in" in problem
    assert f"of user {os.getuid()} with mode 755" in problem
    recipe.parent.chmod(0o777)
    assert containers.problems(paths) == []


def test_a_workspace_that_cannot_be_made_is_named(docker: Stub, recipe: Path) -> None:
    with pytest.raises(UserError, match=r"made at .*recipe\.yaml/work, found: Not a directory"):
        run(config(recipe, workspace=str(recipe / "work")))
    assert docker.calls() == []


def test_a_signal_reaches_the_container(docker: Stub, recipe: Path) -> None:
    docker.play(waits=["synth"])
    words = ["--recipe", str(recipe), "--workspace", str(recipe.parent / "work")]
    words += ["--by", "compose", "--preflight", "false"]
    command = [sys.executable, "-m", "stages.ops", "run", *words]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while not (docker.folder / "waiting").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED
    assert docker.stages() == ["synth"]


def test_a_dry_run_asks_and_starts_nothing(docker: Stub, recipe: Path, tmp_path: Path) -> None:
    """What only an image can tell is not asked here: the hub, its cache, packages."""
    work = tmp_path / "work"
    work.mkdir(mode=0o777)
    work.chmod(0o777)
    (work / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    sections = {
        "run": {"target": "nobody/nothing"},
        "synth": {"prompts": "/workspace/prompts.jsonl"},
    }
    recipe.write_text(yaml.safe_dump(sections))
    words = ["--recipe", str(recipe), "--workspace", str(work), "--by", "compose", "--dry_run"]
    command = [sys.executable, "-m", "stages.ops", "run", *words, "--only", "synth"]
    environment = {**os.environ, "EYRIE_SYNTH_PYTHON": "/nowhere", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "1 row, " in done.stdout
    assert docker.stages() == []
    (docker.folder / "docker").unlink()
    if shutil.which("docker") is None:
        missing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert missing.returncode == 2
        assert "expected docker with its compose plugin" in missing.stderr
