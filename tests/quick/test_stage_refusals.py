# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong before an engine starts: exit 2, one message, nothing lost.

Those of stages that load torch or transformers before they can tell: tests/stages/test_stage_refusals.py.
"""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shared.io import files
from tests.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("target") / "tiny")


@pytest.fixture
def workspace(tmp_path: Path, target: Path) -> Path:
    shutil.copytree(target, tmp_path / "tiny")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    return tmp_path


def run(workspace: Path, stage: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"stages.{stage}", "--workspace", str(workspace), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def synth(workspace: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return run(workspace, "synth", "--target", "tiny", "--prompts", "prompts.jsonl", *flags)


def refused(done: subprocess.CompletedProcess[str], told: str) -> None:
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("ERROR") == 1


def test_empty_input(workspace: Path) -> None:
    (workspace / "prompts.jsonl").write_text("\n\n")
    refused(synth(workspace), "expected at least one row, found none")


def test_broken_lines_are_refused_before_the_engine_starts_and_listed(workspace: Path) -> None:
    lines = ['{"id": "a", "prompt": "Hello"}', '{"prompt": "x"', '{"id": "b", "prompt": ""}']
    (workspace / "prompts.jsonl").write_text("\n".join(lines))
    refused(synth(workspace), "2 of 3 rows failed")
    rejects = (workspace / "run" / "synth" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["failed"] for line in rejects] == ["broken_json", "empty_content"]
    status = files.read_json(workspace / "run" / "status" / "synth.json")
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert status["host"] == socket.gethostname()
    log = (workspace / "run" / "logs" / "synth.log").read_text()
    assert "INFO synth begin: process " in log.splitlines()[0]
    assert "2 of 3 rows failed" in log


def test_a_target_without_a_chat_template(workspace: Path) -> None:
    config = workspace / "tiny" / "tokenizer_config.json"
    values = files.read_json(config)
    values.pop("chat_template", None)
    config.write_text(json.dumps(values))
    (workspace / "tiny" / "chat_template.jinja").unlink(missing_ok=True)
    refused(synth(workspace), "expected a chat template")


def test_a_damaged_target(workspace: Path) -> None:
    (workspace / "tiny" / "config.json").write_text("{")
    refused(synth(workspace), "not valid JSON")


def test_a_target_that_is_nowhere(workspace: Path) -> None:
    done = run(workspace, "synth", "--target", "./none", "--prompts", "prompts.jsonl")
    refused(done, "run.target: expected a model's folder")


def test_a_dump_before_its_synth(workspace: Path) -> None:
    refused(run(workspace, "dump", "--target", "tiny"), "python -m stages.synth")


def test_a_bench_before_its_head(workspace: Path) -> None:
    done = run(workspace, "bench", "--target", "tiny", "--prompts", "prompts.jsonl")
    refused(done, "expected the finished artifact of stage train")


def test_the_chain_stops_at_the_first_failure_with_its_code(workspace: Path) -> None:
    recipe = workspace / "recipe.yaml"
    recipe.write_text("run: {target: tiny}\nsynth: {prompts: nowhere.jsonl}\n")
    done = run(workspace, "ops", "--recipe", str(recipe), "--preflight", "false")
    assert done.returncode == 2
    assert "nowhere.jsonl" in done.stderr
    assert "synth ended with exit code 2" in done.stderr
    assert "Traceback" not in done.stderr
