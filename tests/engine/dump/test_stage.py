# SPDX-License-Identifier: Apache-2.0
"""The stage with real vLLM, as a process: killed with -9, compared with transformers, refused.

Costs about ten engine starts: three minutes on two cores.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from shared.contracts import hidden_states
from tests.runs import ROOT, command, make_synth

pytestmark = pytest.mark.engine

NUM_ROWS = 240
# bf16 states of the same tokens in another batch; measured 0.004, a wrong row gives 1.
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("answered")
    make_synth(workspace, num_rows=NUM_ROWS)
    return workspace


@pytest.fixture
def workspace(answered: Path, tmp_path: Path) -> Path:
    shutil.copytree(answered, tmp_path / "workspace")
    return tmp_path / "workspace"


def start(
    workspace: Path, *flags: str, in_process: bool = False, **variables: str
) -> "subprocess.Popen[str]":
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1"}
    environment |= variables
    return subprocess.Popen(
        [*command(workspace, "dump"), "--backend", "vllm", *flags],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(workspace: Path, *flags: str, in_process: bool = False) -> Path:
    process = start(workspace, *flags, in_process=in_process)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    return workspace / "run" / "dump"


def kill_when(workspace: Path, shards: int, *flags: str, in_process: bool = False) -> None:
    """kill -9 once `shards` shards are whole; every process of the stage must be gone soon after."""
    folder = workspace / "run" / "dump"
    process = start(workspace, *flags, in_process=in_process)
    deadline = time.monotonic() + 200
    while len(list(folder.glob("shard_*.json"))) < shards and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("an engine outlived its stage")


def shards(folder: Path) -> list[hidden_states.Shard]:
    paths = sorted(folder.glob("shard_*.pt"))
    return [hidden_states.read_shard(path, num_states=4, hidden_size=128) for path in paths]


def test_killed_three_times_every_sample_is_there_once_and_right(
    workspace: Path, answered: Path, tmp_path: Path
) -> None:
    shutil.copytree(answered, tmp_path / "undisturbed")
    expected = shards(finish(tmp_path / "undisturbed"))
    assert len(expected) > 20
    rng = random.Random(0)
    for whole in sorted(rng.sample(range(1, len(expected) - 4), 3)):
        kill_when(workspace, whole)
    folder = finish(workspace)
    found = shards(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["ok"] == NUM_ROWS
    assert manifest["facts"]["agreement"] > 0.95
    assert [name for shard in found for name in shard.sample_ids] == [
        f"row-{index:03d}" for index in range(NUM_ROWS)
    ]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.loss_mask, other.loss_mask)
        left, right = one.hidden_states.float(), other.hidden_states.float()
        assert ((left - right).norm() / right.norm()).item() < TOLERANCE
    assert not list(folder.rglob(".*.tmp-*"))


@pytest.mark.parametrize(
    ("said", "delay_s", "comes_later"),
    [
        # The plan is made; importing vLLM comes next.
        ("tokens in", 1.0, "Initializing a V1 LLM engine"),
        # The engine, in its own process, may still get ready while this one ends it.
        ("Initializing a V1 LLM engine", 0.0, "checked and written"),
    ],
)
def test_sigterm_while_the_engine_starts_stops_at_once(
    workspace: Path, said: str, delay_s: float, comes_later: str
) -> None:
    """At once: the stage does not get to its next step, however slow the machine is."""
    process = start(workspace, VLLM_LOGGING_LEVEL="INFO", EYRIE_SHOW_ENGINE="1")
    log = []
    for line in process.stderr or ():
        log.append(line)
        if said in line:
            break
    time.sleep(delay_s)
    assert process.poll() is None, log
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 143, rest
    assert comes_later not in rest


def test_ctrl_c_reaches_the_engine_too_and_ends_as_sigterm_does(workspace: Path) -> None:
    process = start(workspace)
    deadline = time.monotonic() + 200
    folder = workspace / "run" / "dump"
    while len(list(folder.glob("shard_*.json"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the engine's process as well
    _, log = process.communicate(timeout=60)
    assert process.returncode == 143, log
    assert "every whole shard is saved" in log


def test_in_process_and_drained_a_killed_run_ends_with_the_same_bytes(
    workspace: Path, answered: Path, tmp_path: Path
) -> None:
    shutil.copytree(answered, tmp_path / "undisturbed")
    expected = finish(tmp_path / "undisturbed", "--drain", "true", in_process=True)
    kill_when(workspace, 7, "--drain", "true", in_process=True)
    folder = finish(workspace, "--drain", "true", in_process=True)
    paths = sorted(expected.glob("shard_*.pt"))
    assert len(paths) == len(list(folder.glob("shard_*.pt")))
    for path in paths:
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_parity_prints_a_table_and_agrees(workspace: Path) -> None:
    words = command(workspace, "dump", "parity")
    done = subprocess.run(
        [*words, "--backend", "vllm", "--rows", "6"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stderr.splitlines() if "same" in line]
    assert [line[1] for line in lines] == ["2", "4", "5", "8"], done.stderr
    assert "DIFFERS" not in done.stderr
    assert "vllm against hf" in done.stderr
