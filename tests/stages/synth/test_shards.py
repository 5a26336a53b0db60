# SPDX-License-Identifier: Apache-2.0
"""Two shares of synth as their own processes, against a server with the manners of vLLM's."""

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.loopback import loopback
from tests.models import tiny_llama


def test_two_shards_by_the_command_line_each_report_under_their_own_name(
    tmp_path: Path,
) -> None:
    target = tiny_llama(tmp_path / "tiny")
    rows = [json.dumps({"id": f"r{i}", "prompt": f"hello {i}"}) + "\n" for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    with loopback(tmp_path / "server", target) as server:
        words = [sys.executable, "-m", "stages.synth", "--workspace", str(tmp_path)]
        words += ["--target", str(target), "--prompts", "prompts.jsonl", "--endpoints", server]
        for index in (0, 1):
            subprocess.run(
                [*words, "--num_shards", "2", "--shard_index", str(index)], cwd=ROOT, check=True
            )
    status = {
        path.name: json.loads(path.read_text())
        for path in sorted((tmp_path / "run" / "status").glob("*.json"))
    }
    assert {name: each["state"] for name, each in status.items()} == {
        "synth-0.json": "done",
        "synth-1.json": "done",
    }
    manifest = json.loads((tmp_path / "run" / "synth" / "manifest.json").read_text())
    assert manifest["counts"]["ok"] == 5
