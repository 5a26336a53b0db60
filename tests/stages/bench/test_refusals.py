# SPDX-License-Identifier: Apache-2.0
"""What a bench refuses before an engine starts, as its user sees it: one message, no report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.heads import write_random_head
from tests.models import tiny_llama

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals")
    tiny = tiny_llama(folder / "tiny", max_length_tokens=128)
    other = tiny_llama(folder / "other", hidden_size=64)
    write_random_head(folder / "head", target=tiny, draft_vocab_size=128)
    write_random_head(folder / "stranger", target=other, draft_vocab_size=128)
    (folder / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    (folder / "empty.jsonl").write_text("\n\n")
    (folder / "broken.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": \n')
    (folder / "warm.jsonl").write_text('{"id": "w", "prompt": "Hello there."}\n')
    (folder / "old.json").write_text(json.dumps({"schema_version": 1}))
    return folder


HEAD = ("--head", "head")
FEW = ("--max_tokens", "16")
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.mark.parametrize(
    ("name", "flags", "code", "told"),
    [
        ("empty", (*HEAD, "--prompts", "empty.jsonl"), 2, "expected at least one row, found none"),
        ("broken", (*HEAD, "--prompts", "broken.jsonl"), 2, "1 of 2 rows failed"),
        ("warm", (*HEAD, "--prompts", "warm.jsonl"), 2, "none of the warm-up's texts"),
        ("lost", (*HEAD, "--prompts", "lost.jsonl"), 2, "bench.prompts: expected a file"),
        ("stranger", ("--head", "stranger"), 2, "found one for another target"),
        ("headless", ("--head", "./none"), 2, "bench.head: expected a draft head's folder"),
        ("long", (*HEAD, "--max_tokens", "4096"), 2, "the engine has 128"),
        ("deep", (*HEAD, *FEW, "--num_speculative_tokens", "64"), 2, "the engine has 128"),
        ("old", (*HEAD, *FEW, "--earlier_report", "old.json"), 2, "schema version 3, found 1"),
        ("away", ("--endpoint", NOWHERE), 75, f"the server at {NOWHERE} does not answer"),
        (
            "queue",
            (*HEAD, *FEW, "--concurrency", "6", "--engine_args", "{max_num_seqs: 2}"),
            2,
            "max_num_seqs 2",
        ),
        ("secret", ("--endpoint", "http://me:word@host"), 2, "$EYRIE_ENDPOINT_KEY"),
    ],
)
def test_a_refusal(
    workspace: Path, name: str, flags: tuple[str, ...], code: int, told: str
) -> None:
    words = [
        sys.executable,
        "-m",
        "stages.bench",
        "--workspace",
        str(workspace),
        "--target",
        "tiny",
    ]
    words += ["--name", name, *flags]
    words += [] if "--prompts" in flags else ["--prompts", "prompts.jsonl"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert done.stderr.count(" ERROR bench ") == 1
    assert "Traceback" not in done.stderr
    assert "word@host" not in done.stderr
    left = {path.name for path in (workspace / name / "bench").glob("*")}
    assert not left & {"report.json", "report.html", "manifest.json"}
