# SPDX-License-Identifier: Apache-2.0
"""No secret in anything that a run writes: every byte below the workspace is looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loopback import loopback
from tests.runs import ROOT, make_bench, make_synth, run

SECRETS = {
    "EYRIE_ENDPOINT_KEY": "ek-3f9a77c1d0b24e58",
    "HF_TOKEN": "hf_QzExposureTestToken71",
    "HUGGING_FACE_HUB_TOKEN": "hf_QzOlderToken72",
    "WANDB_API_KEY": "wandb-5c5e1f0a",
    "VLLM_API_KEY": "vk-90b1",
}


def holding(folder: Path) -> list[str]:
    """Which files hold a secret, and whose."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [
        f"{path.relative_to(folder)}: {name}"
        for path in files
        for name, secret in SECRETS.items()
        if secret.encode() in path.read_bytes()
    ]


def test_no_secret_in_what_a_run_writes_or_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    make_synth(tmp_path)
    said = ""
    for stage in ("dump", "train"):
        done = run(tmp_path, stage)
        assert done.returncode == 0, done.stderr[-2000:]
        said += done.stdout + done.stderr
    make_bench(tmp_path)
    with loopback(tmp_path / "server", tmp_path / "tiny") as url:
        (tmp_path / "questions.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "broken"}\n')
        command = [sys.executable, "-m", "stages.synth", "--workspace", str(tmp_path)]
        command += ["--target", "tiny", "--prompts", "questions.jsonl", "--name", "asked"]
        command += ["--endpoints", url, "--max_retries", "0", "--max_failed_fraction", "0.9"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr[-2000:]
        said += done.stdout + done.stderr
    rejects = (tmp_path / "asked" / "synth" / "rejects.jsonl").read_text()
    assert "Bearer (the key)" in rejects, "the server repeats the key in its complaint"
    manifest = json.loads((tmp_path / "asked" / "synth" / "manifest.json").read_text())
    assert "--endpoints" in manifest["provenance"]["argv"]
    assert not [name for name, secret in SECRETS.items() if secret in said]
    assert holding(tmp_path) == []
