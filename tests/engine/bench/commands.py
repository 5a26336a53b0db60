# SPDX-License-Identifier: Apache-2.0
"""bench as an operator types it, on the tests' heads, and what it left."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from shared.io import files
from tests.conftest import ROOT


def change(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file(
        {**weights, **{k.replace("__", "."): v for k, v in tensors.items()}}, path, {"format": "pt"}
    )


def command(workspace: Path, name: str, *flags: str) -> list[str]:
    words = [sys.executable, "-m", "stages.bench", "--workspace", str(workspace), "--name", name]
    return [*words, "--prompts", "prompts.jsonl", *flags]


def bench(
    workspace: Path, name: str, *flags: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(workspace, name, *flags),
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )


def report_of(workspace: Path, name: str) -> dict[str, Any]:
    return dict(files.read_json(workspace / name / "bench" / "report.json"))


def refused(done: subprocess.CompletedProcess[str], code: int, told: str, folder: Path) -> None:
    """The exit code of the contract, one message, no report."""
    assert done.returncode == code, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if " ERROR bench " in line]
    assert len(errors) == 1
    assert told in errors[0]
    assert not (folder / "report.json").exists()
    assert not (folder / "report.html").exists()
    assert not (folder / "manifest.json").exists()
