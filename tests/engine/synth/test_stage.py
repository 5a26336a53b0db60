# SPDX-License-Identifier: Apache-2.0
"""synth against its real server: both killed at random moments, and run again."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.contracts import conversations
from tests.conftest import ROOT
from tests.engine.conftest import Demo

pytestmark = pytest.mark.engine

NUM_PROMPTS = 600


def servers_of(workspace: Path) -> list[int]:
    """Processes of vLLM that serve this workspace's target, by what they were started with."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"vllm.entrypoints.openai.api_server" in words and str(workspace).encode() in b" ".join(
            words
        ):
            found.append(int(entry.name))
    return found


def kill_when(folder: Path, parts: int, victims: Callable[[], list[int]]) -> int:
    """SIGKILL to the victims once so many parts are there; returns how many rows those hold."""
    deadline = time.monotonic() + 300
    while len(list(folder.glob("part-*.parquet"))) < parts and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.Random(parts).uniform(0.0, 0.5))
    for pid in victims():
        with contextlib.suppress(ProcessLookupError):  # one of them may have ended another
            os.kill(pid, signal.SIGKILL)
    return len(list(conversations.read_conversations(folder)))


def test_killed_clients_and_a_killed_server_lose_and_repeat_nothing(
    demo: Demo, tmp_path: Path
) -> None:
    shutil.copytree(demo.target, tmp_path / "target")
    lines = (demo.target / "prompts.jsonl").read_text().splitlines()[:NUM_PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "stages.synth", "--workspace", str(tmp_path)]
    command += ["--target", "target", "--prompts", "prompts.jsonl", "--max_length_tokens", "512"]
    command += ["--rows_per_part", "50", "--max_tokens", "224"]
    folder = tmp_path / "run" / "synth"

    saved = 0
    for parts in (1, 4):
        client = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before, saved = saved, kill_when(folder, parts, lambda pid=client.pid: [pid])
        client.wait()
        assert before < saved < NUM_PROMPTS
        assert not (folder / "manifest.json").exists()
        deadline = time.monotonic() + 60
        while servers_of(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not servers_of(tmp_path), "a killed client must not leave its server behind"

    last = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    parts = len(list(folder.glob("part-*.parquet"))) + 1
    assert kill_when(folder, parts, lambda: servers_of(tmp_path)) < NUM_PROMPTS
    _, told = last.communicate(timeout=600)
    assert last.returncode == 0, told[-2000:]
    assert "starting it again" in told

    rows = list(conversations.read_conversations(folder))
    ids = [row.sample_id for row in rows]
    assert sorted(ids) == sorted({json.loads(line)["id"] for line in lines})
    counts = json.loads((folder / "manifest.json").read_text())["counts"]
    assert counts == {"in": NUM_PROMPTS, "ok": NUM_PROMPTS, "skipped": {}, "failed": {}}
    assert not servers_of(tmp_path)

    undisturbed = {
        row.sample_id: row.input_ids for row in conversations.read_conversations(demo.run / "synth")
    }
    equal = sum(undisturbed[row.sample_id] == row.input_ids for row in rows)
    # Greedy bf16 near-ties may fall either way when other rows share the batch.
    assert equal / len(rows) >= 0.99, f"{equal} of {len(rows)} rows are the undisturbed run's"
