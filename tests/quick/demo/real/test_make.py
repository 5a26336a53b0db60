# SPDX-License-Identifier: Apache-2.0
"""`make real` hands its settings on as they are typed."""

import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]


def test_paths_with_spaces_are_one_word() -> None:
    given = ["PROMPTS=joe's prompts.jsonl", "WORKSPACE=my work"]
    asked = subprocess.run(
        ["make", "--dry-run", "real", "demo", *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = asked.stdout.replace("\\\n", " ").splitlines()
    (words,) = (shlex.split(line) for line in lines if "real-target" in line)
    assert words[words.index("--prompts") + 1] == "joe's prompts.jsonl"
    assert "my work/targets/smollm2-quarter" in words
    (words,) = (shlex.split(line) for line in lines if "make-target" in line)
    assert words[-1] == "my work/targets/demo"
