# SPDX-License-Identifier: Apache-2.0
"""All ranks of a node from one command, and the codes that it leaves with."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.train import launch as ranks
from tests.runs import ROOT, make_synth, run


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("launch")
    make_synth(workspace)
    assert run(workspace, "dump").returncode == 0
    return workspace


def start(
    workspace: Path, *arguments: str, start_new_session: bool = False
) -> "subprocess.Popen[str]":
    """Two ranks on this node."""
    command = [sys.executable, "-m", "stages.train.launch", *arguments]
    command += ["--recipe", str(workspace / "recipe.yaml"), "--workspace", str(workspace)]
    environment = {**os.environ, "EYRIE_RANKS": "2", "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=start_new_session,
    )


def test_ranks_are_numbered_over_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    second = ranks.environments(4, 2, 1)
    assert [each["RANK"] for each in second] == ["4", "5", "6", "7"]
    assert [each["LOCAL_RANK"] for each in second] == ["0", "1", "2", "3"]
    assert {each["WORLD_SIZE"] for each in second} == {"8"}
    assert {(each["MASTER_ADDR"], each["MASTER_PORT"]) for each in second} == {("node-0", "29500")}


def test_several_nodes_need_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SystemExit) as left:
        ranks.environments(4, 2, 0)
    assert left.value.code == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"EYRIE_RANKS": "0"}, "$EYRIE_RANKS: expected a number from 1, found '0'."),
        ({"EYRIE_RANKS": "two"}, "$EYRIE_RANKS: expected a number from 1, found 'two'."),
        ({"EYRIE_NODES": "0"}, "$EYRIE_NODES: expected a number from 1, found '0'."),
        (
            {"EYRIE_NODES": "2", "EYRIE_NODE_RANK": "2"},
            "expected less than $EYRIE_NODES, 2, found 2.",
        ),
        ({"MASTER_PORT": "http"}, "$MASTER_PORT: expected a number from 0, found 'http'."),
    ],
)
def test_numbers_of_the_environment_that_cannot_be_start_no_rank(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: dict[str, str],
    said: str,
) -> None:
    for name, value in {"EYRIE_RANKS": "2", "MASTER_ADDR": "127.0.0.1", **given}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a rank was started"))
    monkeypatch.setattr(ranks, "catch_stop_signals", lambda: None)
    with pytest.raises(SystemExit) as left:
        ranks.main(["--recipe", "recipe.yaml"])
    assert left.value.code == 2
    assert capsys.readouterr().err.endswith(f"{said}\n")


@pytest.mark.parametrize(
    ("listed", "count"),
    [(None, 3), ("", 0), ("1", 1), ("0, 2", 2), ("0,-1,2", 1), ("MIG-a,MIG-b", 2)],
)
def test_a_rank_starts_for_each_visible_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listed: str | None, count: int
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(ranks, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert ranks.num_gpus() == count


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert {each["OMP_NUM_THREADS"] for each in ranks.environments(4, 1, 0)} == {"2"}
    assert {each["OMP_NUM_THREADS"] for each in ranks.environments(16, 1, 0)} == {"1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the operator's own
    assert "OMP_NUM_THREADS" not in ranks.environments(4, 1, 0)[0]


def test_a_refusal_is_2_and_not_torchruns_1(workspace: Path) -> None:
    refused = start(workspace, "--num_layers", "2")
    out, _ = refused.communicate(timeout=120)
    assert refused.returncode == 2, out
    assert "Traceback" not in out


def test_a_port_that_is_taken_may_be_free_on_the_next_start(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in {**place, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        refused = run(workspace, "train")
    assert refused.returncode == 75, refused.stderr
    assert f"did not connect at 127.0.0.1:{place['MASTER_PORT']}" in refused.stderr
    assert "Traceback" not in refused.stderr


def children_of(process: "subprocess.Popen[str]") -> list[str]:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def wait_for(found: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 200
    while not found():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_the_ranks_start_is_a_stop(
    workspace: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """They import for seconds, and one that ended there would leave the other waiting for it."""
    shutil.copytree(workspace, tmp_path / "workspace")
    training = start(tmp_path / "workspace", start_new_session=True)
    wait_for(lambda: len(children_of(training)) == 2, training)
    os.killpg(training.pid, number)  # as a terminal or Slurm sends it: to all of them
    out, _ = training.communicate(timeout=120)
    assert training.returncode == 143, out
    assert "Traceback" not in out
    assert not (tmp_path / "workspace/run/train/checkpoints").exists(), "no step was taken"


def test_a_stop_reaches_every_rank_and_the_next_start_continues(workspace: Path) -> None:
    settings = ("--epochs", "60", "--checkpoint_every_steps", "5")
    training = start(workspace, *settings)
    latest = workspace / "run" / "train" / "checkpoints" / "latest.pt"
    wait_for(latest.exists, training)
    training.send_signal(signal.SIGTERM)
    out, _ = training.communicate(timeout=200)
    assert training.returncode == 143, out
    again = start(workspace, *settings)
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    assert out.count("continuing from step") == 1  # the second rank tells its log file alone
    assert "continuing from step" in (workspace / "run/logs/train-rank1.log").read_text()
    manifest = json.loads((workspace / "run" / "train" / "manifest.json").read_text())
    assert manifest["config"]["epochs"] == 60
