# SPDX-License-Identifier: Apache-2.0
"""A scripted cluster, its objects, and `ops run --by kubernetes` on it."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared import cli
from stages.ops.config import RunChainConfig

ROOT = Path(__file__).resolve().parents[5]
RECIPE = "run: {name: r, target: t}\n"
KUBECTL = Path(__file__).with_name("scripted_kubectl.py")
POLL_S = 0.05  # the cluster is asked again at once
WITHIN_S = 60
# `python -m stages.ops`.
OPS = f"""
import runpy
from stages.ops.chain.kubernetes import jobs
jobs._POLL_S = {POLL_S}
runpy.run_module("stages.ops", run_name="__main__", alter_sys=True)
"""
COMMANDS: cli.Commands = {"run": (RunChainConfig, "stages.ops.chain.run:run")}
COMPLETE = {"conditions": [{"type": "Complete", "status": "True"}], "succeeded": 1}


def failed(reason: str, message: str = "", kind: str = "Failed") -> dict[str, Any]:
    condition = {"type": kind, "status": "True", "reason": reason, "message": message}
    return {"conditions": [condition], "failed": 1}


def pod(name: str, **state: Any) -> dict[str, Any]:
    return {"metadata": {"name": name}, "status": {"containerStatuses": [{"state": state}]}}


def an_object(kind: str, name: str, component: str, **more: Any) -> dict[str, Any]:
    labels = {"app.kubernetes.io/component": component}
    metadata = {"name": name, "namespace": "eyrie", "labels": labels}
    return {"kind": kind, "metadata": metadata, **more}


def a_job(stage: str, recipe: str = "recipe-abc") -> dict[str, Any]:
    volumes = [{"name": "recipe", "configMap": {"name": recipe}}]
    template = {"spec": {"volumes": volumes}}
    return an_object("Job", f"{stage}-r", stage, spec={"completions": 2, "template": template})


def config(*words: str) -> RunChainConfig:
    """`ops run` with these words."""
    _, parsed = cli._parse("ops", COMMANDS, ["run", *words])
    assert isinstance(parsed, RunChainConfig)
    return parsed


@dataclasses.dataclass(frozen=True)
class Cluster:
    folder: Path
    caplog: pytest.LogCaptureFixture
    capsys: pytest.CaptureFixture[str]

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def script(self, **statuses: list[dict[str, Any]]) -> None:
        named = {f"{stage}-r": each for stage, each in statuses.items()}
        (self.folder / "script.json").write_text(json.dumps(named))

    def pods(self, **pods: list[dict[str, Any]]) -> None:
        named = {f"{stage}-r": each for stage, each in pods.items()}
        (self.folder / "pods.json").write_text(json.dumps(named))

    def put(self, made: dict[str, Any]) -> None:
        path = self.folder / "objects" / f"{made['kind'].lower()}-{made['metadata']['name']}.json"
        path.write_text(json.dumps(made))

    def words(self, *flags: str) -> list[str]:
        needed = ["--by", "kubernetes", "--recipe", str(self.recipe), "--overlay", str(self.folder)]
        return [*needed, *flags]

    def start(self, *flags: str) -> "subprocess.Popen[str]":
        """The command, in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-c", OPS, "run", *self.words(*flags)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *flags: str) -> tuple[int, str]:
        """The command in this process: its exit code and its log. One that goes on for ever is ended."""
        self.caplog.clear()
        signal.alarm(WITHIN_S)
        code = cli._run(config(*self.words(*flags)), COMMANDS["run"][1])
        signal.alarm(0)
        return code, self.caplog.text + self.capsys.readouterr().err

    def commands(self) -> list[str]:
        return (self.folder / "commands.txt").read_text().splitlines()


def a_claim(name: str) -> dict[str, Any]:
    return {"kind": "PersistentVolumeClaim", "metadata": {"name": name}}
