# SPDX-License-Identifier: Apache-2.0
"""`make real` hands its settings on as they are typed."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]


def test_paths_with_spaces_are_one_word() -> None:
    asked = subprocess.run(
        ["make", "--dry-run", "real", "demo", "WORKSPACE=my work"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = asked.stdout.replace("\\\n", " ").splitlines()
    (words,) = (shlex.split(line) for line in lines if "real-target" in line)
    assert "my work/targets/smollm2-quarter" in words
    (words,) = (shlex.split(line) for line in lines if "make-target" in line)
    assert words[-1] == "my work/targets/demo"


@pytest.mark.parametrize(
    "name", ["joe's prompts.jsonl", 'say "a".jsonl', "in $(HOME).jsonl", "a`b.jsonl", "$PATH"]
)
@pytest.mark.parametrize("is_argument", [True, False])
def test_no_character_of_a_path_means_anything_to_make_or_the_shell(
    tmp_path: Path, name: str, is_argument: bool
) -> None:
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/words\n')
    stand_in.chmod(0o755)
    given = [f"PROMPTS={name}"] if is_argument else []
    subprocess.run(
        ["make", "--old-file", "setup", "real", f"PY={stand_in}", f"WORKSPACE={tmp_path}", *given],
        cwd=ROOT,
        env={**os.environ, "PROMPTS": name},
        capture_output=True,
        check=True,
    )
    words = (tmp_path / "words").read_text().splitlines()
    assert words[words.index("--prompts") + 1] == name
